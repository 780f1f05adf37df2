"""Print the ranges of layers that quantize jobs take, for shell scripts: `0:10 10:20`, or an empty line if there are none.

python -m dist_spin.launch.layer_ranges CONFIG.yaml [key=value ...]
"""

import sys

from dist_spin.config.loader import load_config
from dist_spin.errors import UserError
from dist_spin.pipeline.export_limits import check_export_target
from dist_spin.pipeline.model import open_configured_model
from dist_spin.quantize.job import layer_ranges_of
from dist_spin.runtime import distributed


def main(words: list[str]) -> int:
    """Returns the exit code."""
    try:
        config = load_config(words[0], words[1:])
        if config.quantize.method == "none" or config.quant.w_bits == 16:
            print()
            return 0
        distributed.start("cpu", threads=1)
        files = open_configured_model(config)
        check_export_target(config, files.config)  # before the script submits a job
    except UserError as error:
        print(f"dist-spin: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        distributed.stop()
    print(
        " ".join(
            f"{start}:{stop}" for start, stop in layer_ranges_of(files.shape.layers, config.quantize.layers_per_job)
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
