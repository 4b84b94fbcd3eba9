"""The openly licensed art the base is trained on: fetched from the packages that carry it,
captioned, at 64 px.

Everything comes from PyPI and npm; none of it is kept in this repository. Licenses and credits:
CREDITS.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from backgrounds import NAMES as BACKGROUNDS
from backgrounds import draw_background
from PIL import Image
from sprites import COLORS, draw_sprite
from tqdm import tqdm

SIZE = 64
ROBOHASH = "robohash==2.0"
NODE_PACKAGES = [
    "@dicebear/core@9.4.3",
    "@dicebear/collection@9.4.3",
    "@iconify-json/fluent-emoji-flat@1.2.6",
    "@resvg/resvg-js@2.6.2",
]

# What RoboHash's numbered parts look like; an empty text is a part too small or too plain to be
# worth a word.
SET1_ACCESSORIES = {
    "01": "box on head",
    "02": "",
    "03": "antenna",
    "04": "button",
    "05": "dish",
    "06": "moustache",
    "07": "knob on head",
    "08": "aerial",
    "09": "wires",
    "10": "spike",
}
SET1_EYES = {
    "01": "angry eyes",
    "02": "round eyes",
    "03": "red eye",
    "04": "slot eyes",
    "05": "one eye",
    "06": "dot eyes",
    "07": "yellow eyes",
    "08": "thin eyes",
    "09": "goggles",
    "10": "blue glass",
}
SET1_FACES = {
    "01": "",
    "02": "round head",
    "03": "tall head",
    "04": "egg head",
    "05": "can head",
    "06": "bulb head",
    "07": "triangle head",
    "08": "hood",
    "09": "drop head",
    "10": "square head",
}
SET2_HORNED = {4, 6, 7, 15}
SET4_COLORS = [
    "brown",
    "green",
    "black",
    "purple",
    "red",
    "yellow",
    "pink",
    "brown",
    "blue",
    "yellow",
    "orange",
    "gray",
    "orange",
    "white",
    "orange",
]
SET4_ACCESSORIES = {
    0: "red scarf",
    3: "headband",
    4: "bow tie",
    5: "hat",
    6: "telephone",
    7: "blue scarf",
    11: "bandana",
    12: "bow tie",
    13: "red hat",
    14: "headphones",
}

# Share of each kind among the training images.
MIX = {
    "robot": 0.19,
    "sprite": 0.60,
    "robot head": 0.06,
    "person": 0.05,
    "monster": 0.04,
    "cat": 0.04,
    "thumb": 0.01,
    "emoji": 0.01,
}

NODE_SCRIPT = """
import { createAvatar } from '@dicebear/core';
import { pixelArt, thumbs } from '@dicebear/collection';
import { Resvg } from '@resvg/resvg-js';
import { readFileSync, writeFileSync, mkdirSync } from 'node:fs';

const COLORS = JSON.parse(process.argv[2]);
const SKIPPED = /light|dark|medium|flag|family|man|woman|person|people|o-clock|squared|input|button|keycap/;
const names = Object.keys(COLORS);
const hex = (name) => COLORS[name].map((v) => v.toString(16).padStart(2, '0')).join('');
const save = (kind, index, svg) => {
  const image = new Resvg(svg, { fitTo: { mode: 'width', value: 128 } }).render();
  writeFileSync(`out/${kind}_${String(index).padStart(5, '0')}.png`, image.asPng());
};
mkdirSync('out', { recursive: true });
const captions = {};
for (let i = 0; i < 3000; i++) {
  const name = names[i % names.length];
  save('person', i, createAvatar(pixelArt, { seed: `p${i}`, clothingColor: [hex(name)] }).toString());
  captions[`person_${String(i).padStart(5, '0')}`] = `a pixel art person, ${name} shirt`;
}
for (let i = 0; i < 1000; i++) {
  const name = names[i % names.length];
  const options = { seed: `t${i}`, shapeColor: [hex(name)], backgroundColor: ['transparent'] };
  save('thumb', i, createAvatar(thumbs, options).toString());
  captions[`thumb_${String(i).padStart(5, '0')}`] = `${name === 'orange' ? 'an' : 'a'} ${name} thumb with a face`;
}
const set = JSON.parse(readFileSync('node_modules/@iconify-json/fluent-emoji-flat/icons.json'));
let index = 0;
for (const [name, icon] of Object.entries(set.icons)) {
  if (SKIPPED.test(name)) continue;
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="-2 -2 36 36">${icon.body}</svg>`;
  save('emoji', index, svg);
  captions[`emoji_${String(index).padStart(5, '0')}`] = `${name.replaceAll('-', ' ')} icon`;
  index += 1;
}
writeFileSync('out/captions.json', JSON.stringify(captions));
"""

Drawn = tuple[Image.Image, str]  # RGBA at SIZE x SIZE, and its caption without the background


def fetch(folder: Path) -> None:
    """Get the packages into folder and render the vector art; does nothing if that was done
    before."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "robohash").is_dir():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(folder),
            ROBOHASH,
        ]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(folder.glob("robohash-*.whl"))) as wheel:
            wheel.extractall(folder)
    if not (folder / "out" / "captions.json").is_file():
        (folder / "package.json").write_text(
            '{"private": true, "type": "module"}', encoding="utf-8"
        )
        (folder / "render.js").write_text(NODE_SCRIPT, encoding="utf-8")
        npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", *NODE_PACKAGES]
        subprocess.run(npm, cwd=folder, check=True)
        subprocess.run(["node", "render.js", json.dumps(COLORS)], cwd=folder, check=True)


def compose_images(folder: Path, count: int, seed: int) -> tuple[np.ndarray, list[str], list[str]]:
    """Compose count different images: uint8 [count, 64, 64, 3], their captions and their kinds."""
    rng = np.random.default_rng(seed)
    painters = _painters(folder)
    kinds, shares = list(MIX), np.array(list(MIX.values()))
    images, captions, kinds_drawn = np.empty((count, SIZE, SIZE, 3), np.uint8), [], []
    for index in tqdm(range(count), desc="composing images", unit="image"):
        kind = str(rng.choice(kinds, p=shares / shares.sum()))
        figure, caption = painters[kind](rng)
        background = "white" if rng.random() < 0.2 else str(rng.choice(BACKGROUNDS))
        canvas = Image.fromarray(draw_background(background, rng)).convert("RGBA")
        canvas.alpha_composite(figure)
        images[index] = np.asarray(canvas.convert("RGB"))
        captions.append(f"{caption}, {background} background")
        kinds_drawn.append("pixel monster" if kind == "sprite" and "monster" in caption else kind)
    return images, captions, kinds_drawn


def _painters(folder: Path) -> dict[str, Callable[[np.random.Generator], Drawn]]:
    sets = folder / "robohash" / "sets"
    set1 = {
        color.name: _layers(color) for color in sorted((sets / "set1").iterdir()) if color.is_dir()
    }
    set2, set3, set4 = (_layers(sets / name) for name in ("set2", "set3", "set4"))
    head_colors = [_nearest_color(image) for image in set3["BaseFace"].values()]
    face_colors = [_nearest_color(image) for image in set2["FaceColors"].values()]
    body_colors = [_nearest_color(image) for image in set2["BodyColors"].values()]
    rendered = json.loads((folder / "out" / "captions.json").read_text(encoding="utf-8"))

    def robot(rng: np.random.Generator) -> Drawn:
        color = str(rng.choice(list(set1)))
        chosen, figure = _compose(rng, set1[color])
        words = [
            table[chosen[part][-2:]]
            for part, table in (
                ("Face", SET1_FACES),
                ("Accessory", SET1_ACCESSORIES),
                ("Eyes", SET1_EYES),
            )
        ]
        kept = [word for word in words if word and rng.random() < 0.7]
        return figure, ", ".join([f"{_a(color.replace('grey', 'gray'))} robot", *kept])

    def robot_head(rng: np.random.Generator) -> Drawn:
        chosen, figure = _compose(rng, set3)
        return (
            figure,
            f"{_a(head_colors[list(set3['BaseFace']).index(chosen['BaseFace'])])} robot head",
        )

    def monster(rng: np.random.Generator) -> Drawn:
        face = int(rng.integers(len(face_colors)))
        alike = [i for i, color in enumerate(body_colors) if color == face_colors[face]] or [face]
        fixed = {"FaceColors": face, "BodyColors": int(rng.choice(alike))}
        chosen, figure = _compose(rng, set2, fixed)
        horns = ", horns" if list(set2["Faces"]).index(chosen["Faces"]) in SET2_HORNED else ""
        return figure, f"{_a(face_colors[face])} monster{horns}"

    def cat(rng: np.random.Generator) -> Drawn:
        chosen, figure = _compose(rng, set4)
        accessory = SET4_ACCESSORIES.get(list(set4["accessories"]).index(chosen["accessories"]))
        color = SET4_COLORS[list(set4["body"]).index(chosen["body"])]
        return figure, f"{_a(color)} cat" + (f", {accessory}" if accessory else "")

    def sprite(rng: np.random.Generator) -> Drawn:
        cells, caption = draw_sprite(rng)
        return Image.fromarray(np.ascontiguousarray(cells)), caption

    def from_package(kind: str) -> Callable[[np.random.Generator], Drawn]:
        files = sorted((folder / "out").glob(f"{kind}_*.png"))
        images = [
            Image.open(file).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.BOX)
            for file in files
        ]

        def draw(rng: np.random.Generator) -> Drawn:
            index = int(rng.integers(len(images)))
            return images[index], rendered[files[index].stem]

        return draw

    return {
        "robot": robot,
        "robot head": robot_head,
        "monster": monster,
        "cat": cat,
        "sprite": sprite,
        "person": from_package("person"),
        "thumb": from_package("thumb"),
        "emoji": from_package("emoji"),
    }


def _layers(folder: Path) -> dict[str, dict[str, Image.Image]]:
    """RoboHash's part folders in the order in which it pastes them: {part: {file stem: RGBA
    image}}."""
    parts = sorted(
        (path for path in folder.iterdir() if path.is_dir()),
        key=lambda path: path.name.split("#")[1],
    )
    return {
        part.name.split("#")[1].lstrip("0123456789"): {
            file.stem: Image.open(file).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.BOX)
            for file in sorted(part.glob("*.png"))
        }
        for part in parts
    }


def _compose(
    rng: np.random.Generator,
    layers: dict[str, dict[str, Image.Image]],
    fixed: dict[str, int] | None = None,
) -> tuple[dict[str, str], Image.Image]:
    figure = Image.new("RGBA", (SIZE, SIZE))
    chosen = {}
    for part, images in layers.items():
        names = list(images)
        chosen[part] = names[(fixed or {}).get(part, int(rng.integers(len(names))))]
        figure.alpha_composite(images[chosen[part]])
    return chosen, figure


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _nearest_color(image: Image.Image) -> str:
    """The color word for a flat part: nearest in hue where it has one, else by lightness."""
    pixels = np.asarray(image).reshape(-1, 4)
    mean = np.median(pixels[pixels[:, 3] > 200][:, :3], axis=0)
    if np.ptp(mean) < 40:
        return "black" if mean.mean() < 80 else "gray" if mean.mean() < 200 else "white"
    chromatic = {
        name: np.array(rgb)
        for name, rgb in COLORS.items()
        if name not in ("white", "gray", "black")
    }

    def distance(rgb: np.ndarray) -> float:
        a, b = (color - color.mean() for color in (mean, rgb))
        return (
            -float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            + abs(mean.mean() - rgb.mean()) / 400
        )

    return min(chromatic, key=lambda name: distance(chromatic[name]))
