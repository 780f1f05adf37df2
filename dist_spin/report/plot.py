"""Write one figure of a run to a file.

dist-spin plot runs/NAME                        names what can be drawn
dist-spin plot runs/NAME loss -o loss.svg       SVG follows the reader's light or dark, PNG takes --dark
"""

from pathlib import Path

from dist_spin.errors import UserError
from dist_spin.report.figures import drawings
from dist_spin.report.run_summary import load_run_summary
from dist_spin.report.style import as_png, as_svg
from dist_spin.runtime.progress import say
from dist_spin.storage.atomic import atomic, write_text


def plot(path: Path, name: str = "", target: str | None = None, theme: str = "light") -> None:
    """Draw figure `name` of the run directory `path` to `target` (.png or .svg; default NAME.png), or list the figures.

    Raises:
        UserError: no such run or figure, or a file name with another ending.
    """
    figures = {drawing.name: drawing for drawing in drawings(load_run_summary(path))}
    if not name:
        width = max(map(len, figures), default=0)
        print(
            "\n".join(f"{key:{width}}  {drawing.caption}" for key, drawing in figures.items()) or "nothing to draw yet"
        )
        return
    if name not in figures:
        raise UserError(f"{path} has no figure '{name}'", f"use one of {', '.join(figures) or '(none yet)'}")
    file = Path(target or f"{name}.png")
    drawing = figures[name]
    if file.suffix == ".svg":
        text = as_svg(drawing.draw, drawing.caption, standalone=True)
        write_text(file, f'<?xml version="1.0" encoding="utf-8"?>\n{text}')
    elif file.suffix == ".png":
        with atomic(file) as temporary:
            temporary.write_bytes(as_png(drawing.draw, theme))
    else:
        raise UserError(f"{file} is neither .png nor .svg", "give -o NAME.png or NAME.svg")
    say(f"wrote {file}")
