"""Two versions of the demo on one page, the same prompts side by side.

    python demo/compare_demos.py OLD_FOLDER NEW_FOLDER --output compare.html

OLD_FOLDER and NEW_FOLDER are outputs of generate_megaman.py --demo, each with its own base and
LoRA. The page is one file; images of the same prompt and seed stand next to each other, with those
of the base alone.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
from pathlib import Path

STYLE = """
body { font: 16px/1.4 system-ui, sans-serif; margin: 2rem; background: #f6f6f4; color: #1c1c28 }
table { border-collapse: collapse }
td, th { padding: .4rem .6rem; text-align: left; vertical-align: middle }
img { width: 160px; height: 160px; image-rendering: pixelated; display: block; border-radius: 4px }
"""


def records_by_prompt(folder: Path) -> dict[tuple[str, int], dict]:
    records = json.loads((folder / "images.json").read_text(encoding="utf-8"))["images"]
    return {(record["prompt"], record["seed"]): record for record in records}


def image_tag(folder: Path, file: str | None) -> str:
    if not file:
        return ""
    content = base64.b64encode((folder / file).read_bytes()).decode()
    return f'<img alt="" src="data:image/png;base64,{content}">'


def page(old_folder: Path, new_folder: Path) -> str:
    old, new = records_by_prompt(old_folder), records_by_prompt(new_folder)
    rows = []
    for key in new:
        if key not in old:
            continue
        cells = [
            image_tag(folder, records[key].get(name))
            for folder, records in ((old_folder, old), (new_folder, new))
            for name in ("base_file", "file")
        ]
        cells.append(html.escape(f"{key[0]} (seed {key[1]})"))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = ("old base", "old, with the LoRA", "new base", "new, with the LoRA", "prompt")
    titles = "".join(f"<th>{title}</th>" for title in head)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>The demo, old and new</title>'
        f"<style>{STYLE}</style><h1>The demo, old and new</h1>"
        f"<table><tr>{titles}</tr>{''.join(rows)}</table></html>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--output", type=Path, default=Path("compare.html"))
    options = parser.parse_args()
    options.output.write_text(page(options.old, options.new), encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    main()
