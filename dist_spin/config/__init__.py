"""The run's settings: one dataclass per component, and the loader that reads them from YAML and the command line."""
