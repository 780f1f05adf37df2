"""docs/models.md holds the table of families, as `python tests/test_models_page.py` writes it there."""

from pathlib import Path

from dist_spin.model.families import FAMILIES, REFUSED

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
START, END = "<!-- the table of families -->", "<!-- end -->"
WINDOWS = {"none": "", "all": "in all layers", "by layer": "by layer"}


def tables() -> str:
    """Families that are rotated, and those that are refused, as Markdown."""
    lines = [
        "| `model_type` | Models | Rotated | Sliding windows | Exported as | Engines | Read how |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, family in FAMILIES.items():
        exported = f"`{family.read_as or kind}`"
        cells = (
            f"`{kind}`",
            family.models,
            "R2, R3, R4" if family.without_r1 else "R1, R2, R3, R4",
            WINDOWS[family.windows],
            exported,
            family.engines or "not tried",
            family.how or "as it is",
        )
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    lines += ["", "| Without R1 | Because |", "|---|---|"]
    lines += [f"| `{kind}` | {family.without_r1} |" for kind, family in FAMILIES.items() if family.without_r1]
    lines += ["", "| Refused | Because of |", "|---|---|"]
    for reason in dict.fromkeys(REFUSED.values()):
        lines.append(f"| {', '.join(f'`{kind}`' for kind, why in REFUSED.items() if why == reason)} | {reason} |")
    return "\n".join(lines)


def page() -> str:
    """The page with its tables made anew."""
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    return f"{before}{START}\n{tables()}\n{END}{rest.split(END)[1]}"


def test_the_page_of_models_is_the_table_of_families() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/test_models_page.py"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
