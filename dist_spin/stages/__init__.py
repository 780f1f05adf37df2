"""The resumable stages of the pipeline; each is one verb of the command line."""
