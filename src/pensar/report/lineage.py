"""The lineage graph: artifacts in layers, each below what it was made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pensar.report.charts import CHARACTER, picture, text
from pensar.report.contents import StageRow
from pensar.report.html import Markup, element
from pensar.report.numbers import duration

ROW, PADDING, GAP_X, GAP_Y = 20.0, 7.0, 22.0, 30.0
THIN = 10.0
"""Width that a passing edge takes in a layer."""
SWEEPS = 24


@dataclass
class Box:
    """A node: one artifact, or a chain of them that nothing joins or leaves; without rows, an edge passing a layer."""

    name: str
    rows: list[tuple[str, str]]
    layer: int = 0
    x: float = 0.0
    y: float = 0.0
    height: float = 0.0
    above: list["Box"] = field(default_factory=list)
    below: list["Box"] = field(default_factory=list)

    @property
    def width(self) -> float:
        if not self.rows:
            return THIN
        return max((len(name) + len(time)) * CHARACTER + 40 for name, time in self.rows)

    def __post_init__(self) -> None:
        self.fit()

    def fit(self) -> None:
        """Makes the box as high as its rows."""
        self.height = len(self.rows) * ROW + 2 * PADDING if self.rows else 0.0


def lineage_chart(stages: Sequence[StageRow]) -> Markup:
    """Boxes from the first artifacts above to the last below; edges that a longer path implies are left out."""
    boxes = _chained(stages, _reduced(_sources(stages)))
    _layer(boxes)
    layers = _with_passing_edges(boxes)
    _order(layers)
    width = _place(layers)
    height = max(box.y + box.height for layer in layers for box in layer) + 4
    marks: list[Markup] = []
    for layer in layers:
        for box in layer:
            marks += [_edge(above, box) for above in box.above]
    marks += [_box(box) for layer in layers for box in layer if box.rows]
    return picture(width, height, "What each artifact was made from", marks)


def _sources(stages: Sequence[StageRow]) -> dict[str, list[str]]:
    """Folder -> folders it was made from; adopted ones, which are outside the run, included."""
    sources = {stage.folder: list(dict.fromkeys(stage.inputs.values())) for stage in stages}
    for used in [name for names in sources.values() for name in names]:
        sources.setdefault(used, [])
    return sources


def _reduced(sources: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Without the edges that a longer path implies."""
    ancestors: dict[str, set[str]] = {}

    def reach(name: str) -> set[str]:
        if name not in ancestors:
            ancestors[name] = set()
            for source in sources[name]:
                ancestors[name] |= {source} | reach(source)
        return ancestors[name]

    return {
        name: [
            source
            for source in direct
            if not any(source in reach(other) for other in direct if other != source)
        ]
        for name, direct in sources.items()
    }


def _chained(stages: Sequence[StageRow], sources: Mapping[str, list[str]]) -> list[Box]:
    """Boxes, chains merged, inputs before what is made from them."""
    rows = {stage.folder: (stage.name, duration(stage.seconds)) for stage in stages}
    uses: dict[str, list[str]] = {name: [] for name in sources}
    for name, direct in sources.items():
        for source in direct:
            uses[source].append(name)
    box_of: dict[str, Box] = {}
    for name in _in_order(sources):
        row = rows.get(name, (_outside_name(name), "adopted" if "/" in name else "gone"))
        direct = sources[name]
        if len(direct) == 1 and len(uses[direct[0]]) == 1:
            box_of[name] = box_of[direct[0]]
            box_of[name].rows.append(row)
            box_of[name].fit()
            continue
        box = box_of[name] = Box(name, [row])
        for above in {id(box_of[source]): box_of[source] for source in direct}.values():
            box.above.append(above)
            above.below.append(box)
    return list({id(box): box for box in box_of.values()}.values())


def _in_order(sources: Mapping[str, list[str]]) -> list[str]:
    done: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in done:
            for source in sources[name]:
                visit(source)
            done[name] = None

    for name in sources:
        visit(name)
    return list(done)


def _outside_name(folder: str) -> str:
    return folder.rstrip("/").rpartition("/")[2] or folder


def _layer(boxes: Sequence[Box]) -> None:
    """Each box one below the lowest of its sources; those without sources just above their first use."""
    for box in boxes:
        box.layer = 1 + max((above.layer for above in box.above), default=-1)
    for box in boxes:
        if not box.above and box.below:
            box.layer = min(below.layer for below in box.below) - 1


def _with_passing_edges(boxes: Sequence[Box]) -> list[list[Box]]:
    """Layers from above, with a thin box wherever an edge crosses a layer."""
    layers: list[list[Box]] = [[] for _ in range(max(box.layer for box in boxes) + 1)]
    for box in boxes:
        layers[box.layer].append(box)
    for box in boxes:
        for place, above in enumerate(box.above):
            upper = above
            for layer in range(above.layer + 1, box.layer):
                passing = Box("", [], layer=layer, above=[upper])
                upper.below = [passing if below is box else below for below in upper.below]
                passing.below = [box]
                layers[layer].append(passing)
                upper = passing
            box.above[place] = upper
    return layers


def _order(layers: Sequence[list[Box]]) -> None:
    """Orders each layer by the mean place of its neighbours, down and up in turn, to cross few edges."""
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            places = {id(box): place for other in layers for place, box in enumerate(other)}
            means = {}
            for place, box in enumerate(layer):
                near = box.above if down else box.below
                means[id(box)] = sum(places[id(n)] for n in near) / len(near) if near else place
            layer.sort(key=lambda box: means[id(box)])


def _place(layers: Sequence[list[Box]]) -> float:
    """Sets the coordinates; returns the width of the picture."""
    y = 4.0
    for layer in layers:
        x = 0.0
        tallest = max(box.height for box in layer)
        for box in layer:
            box.x, box.y = x, y
            x += box.width + GAP_X
            if not box.rows:
                box.height = tallest
        y += tallest + GAP_Y
    for sweep in range(SWEEPS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            _pull(layer)
    left = min(box.x for layer in layers for box in layer)
    for layer in layers:
        for box in layer:
            box.x += 4 - left
    return max(box.x + box.width for layer in layers for box in layer) + 4


def _pull(layer: list[Box]) -> None:
    """Moves each box of a layer under the middle of its neighbours, as far as its neighbours in the layer let it."""
    wanted = []
    for box in layer:
        near = [*box.above, *box.below]
        middles = [other.x + other.width / 2 for other in near] or [box.x + box.width / 2]
        wanted.append(sum(middles) / len(middles) - box.width / 2)
    ends: list[float] = []
    for place, box in zip(wanted, layer, strict=True):
        ends.append(max(place, ends[-1] if ends else place))
        ends[-1] += box.width + GAP_X
    starts = [end - box.width - GAP_X for end, box in zip(ends, layer, strict=True)]
    # What was pushed aside pushes back: the layer as a whole keeps its middle.
    shift = sum(w - s for w, s in zip(wanted, starts, strict=True)) / max(len(layer), 1)
    for start, box in zip(starts, layer, strict=True):
        box.x = start + shift


def _edge(above: Box, box: Box) -> Markup:
    x1, y1 = above.x + above.width / 2, above.y + above.height
    x2, y2 = box.x + box.width / 2, box.y
    bend = (y1 + y2) / 2
    d = f"M{x1:.1f} {y1:.1f}C{x1:.1f} {bend:.1f} {x2:.1f} {bend:.1f} {x2:.1f} {y2:.1f}"
    if not box.rows:
        # The passing edge goes straight through its own place in the layer.
        return element("path", d=f"{d}v{box.height:.1f}", class_="edge")
    return element("path", d=f"{d}m-3.5 -6l3.5 6l3.5 -6", class_="edge")


def _box(box: Box) -> Markup:
    outline = element("rect", x=box.x, y=box.y, width=box.width, height=box.height, rx=6, class_="box")
    rows = []
    for number, (name, time) in enumerate(box.rows):
        y = box.y + PADDING + ROW * number + 14
        rows.append(text(box.x + 12, y, name, "label"))
        rows.append(text(box.x + box.width - 12, y, time, "tick", "end"))
    return element("g", outline, rows)
