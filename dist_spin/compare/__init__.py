"""The systems of the published tables beside ours, measured under the same conditions."""
