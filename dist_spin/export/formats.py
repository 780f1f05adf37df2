"""The export formats: one file each, one row here. `ExportConfig.target` names them for the settings and the command line."""

from dist_spin.export import compressed, executorch, gguf, hf
from dist_spin.export.export_job import ExportFormat

FORMATS: dict[str, ExportFormat] = {
    "hf": hf.FORMAT,
    "compressed-tensors": compressed.FORMAT,
    "gguf": gguf.FORMAT,
    "executorch": executorch.FORMAT,
}
