"""What tools answer: text that a model reads, and the same as structured values, within a bound that is always told."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from mcp_types import CallToolResult, ContentBlock, ImageContent, ResourceLink, TextContent
from pydantic import BaseModel, ConfigDict, Field

from era.common.run_notes import run_notes

MOST_CHARACTERS = 20_000
"""Of stdout, and of stderr, in an answer. Most models read no more at once."""

_TAIL = MOST_CHARACTERS // 4
"""Of these, how many are the end of what was written: errors stand there."""

IMAGES = {"image/png", "image/jpeg", "image/gif", "image/webp"}
MOST_IMAGES = 4
MOST_IMAGE_BYTES = 1 << 20

_RUN_FIELDS = ("exit_code", "status", "duration", "session_id", "run_id", "data", "state", "artifacts")
_CELL_FIELDS = ("context", "execution_count", "memory", "results_truncated")


class RunResult(BaseModel):
    """How a program ended, and what it wrote."""

    model_config = ConfigDict(extra="allow")

    exit_code: int
    status: str = Field(description="ok, failed, timeout, oom, killed or disk_full")
    stdout: str
    stderr: str
    stdout_truncated: bool = Field(description="Whether stdout is not all that the program wrote.")
    stderr_truncated: bool
    duration: str
    session_id: str | None = None
    run_id: str | None = None
    data: dict[str, Any] | None = Field(None, description="The session's state after the run.")
    results: str | None = Field(None, description="With a context: what the cell showed, its last value too, as text.")


def text_result(text: str, structured: Mapping[str, Any]) -> CallToolResult:
    return CallToolResult(content=[TextContent(text=text)], structured_content=dict(structured))


def failure(text: str) -> CallToolResult:
    return CallToolResult(content=[TextContent(text=text)], is_error=True)


def run_result(
    answer: Mapping[str, Any],
    *,
    shown_images: Sequence[ImageContent] = (),
    left_images: Sequence[ImageContent] = (),
    unread: Sequence[str] = (),
    in_session: bool,
) -> CallToolResult:
    """The answer of a run, whose stdout and stderr may be Shortened already, with pictures that it showed and left.
    `unread` are lines about what could not be had of these, or of what it printed. A program that failed is no failure
    of the tool: the model wants to see how."""
    structured: dict[str, Any] = {name: answer[name] for name in _RUN_FIELDS + _CELL_FIELDS if name in answer}
    parts: list[str] = []
    links: list[ContentBlock] = []
    for stream in ("stdout", "stderr"):
        written = answer[stream] if isinstance(answer[stream], Shortened) else Shortened(answer[stream])
        shown = written.text()
        structured[stream] = shown
        structured[f"{stream}_truncated"] = bool(answer[f"{stream}_truncated"]) or not written.is_whole
        if shown:
            parts.append(shown.rstrip("\n") if stream == "stdout" else f"[stderr]\n{shown.rstrip()}")
        if not written.is_whole and in_session:
            uri = f"session://{answer['session_id']}/runs/{answer['run_id']}/{stream}"
            links.append(ResourceLink(uri=uri, name=f"all of {stream}", mime_type="text/plain"))
    if "results" in answer:
        structured["results"] = shown = _shown(answer, len(shown_images))
        parts += [shown] if shown else []
    if answer["status"] != "ok":
        parts.append(f"[{answer['status']}: exit code {answer['exit_code']} after {answer['duration']}]")
    parts += run_notes(answer)
    listed = [item["path"] for item in answer.get("artifacts", [])]
    if listed:
        parts.append(f"[files to look at, with era_read_file: {', '.join(listed)}]")
    parts += unread
    text = "\n".join(parts) or "[no output]"
    content: list[ContentBlock] = [TextContent(text=text), *shown_images, *left_images, *links]
    return CallToolResult(content=content, structured_content=structured)


def _shown(answer: Mapping[str, Any], images: int) -> str:
    """What a cell showed, as text, within the bound of what is printed. So many `images` come beside it."""
    texts = Shortened()
    for number, result in enumerate(answer["results"]):
        texts.add("\n" if number else "")
        texts.add(_text_of(result["data"]))
    if left_out := sum(not IMAGES.isdisjoint(result["data"]) for result in answer["results"]) - images:
        texts.add(f"\n[of its pictures {left_out} are left out: save them as files, and read those with era_read_file]")
    return texts.text()


def _text_of(bundle: Mapping[str, Any]) -> str:
    """The form of something shown, by MIME type, that a model reads best."""
    for kind in ("text/markdown", "text/plain"):
        if isinstance(bundle.get(kind), str):
            return str(bundle[kind])
    return f"<{', '.join(bundle)}>"


def shown_pictures(results: list[dict[str, Any]]) -> list[ImageContent]:
    """The first small pictures that a cell showed. What says to be one, and is no base64, is left out."""
    pictures: list[ImageContent] = []
    for bundle in (result["data"] for result in results):
        kind = next((kind for kind in bundle if kind in IMAGES), None)
        if kind is None or len(pictures) == MOST_IMAGES:
            continue
        try:
            data = base64.b64decode("".join(bundle[kind].split()), validate=True)
        except (AttributeError, ValueError):
            continue
        if data and len(data) <= MOST_IMAGE_BYTES:
            pictures.append(image(data, kind))
    return pictures


def image(data: bytes, media_type: str) -> ImageContent:
    return ImageContent(data=base64.b64encode(data).decode(), mime_type=media_type)


class Shortened:
    """A text, or its beginning and its end with the number of characters between. It may come in pieces, of which no
    more is held than is shown."""

    def __init__(self, text: str = "") -> None:
        self._size = 0
        self._head = self._rest = ""
        """`_rest` follows `_head`, as far as the end of it may be shown."""

        self.add(text)

    def add(self, piece: str) -> None:
        self._size += len(piece)
        room = MOST_CHARACTERS - _TAIL - len(self._head)
        self._head += piece[:room]
        self._rest = (self._rest + piece[room:])[-_TAIL:]

    def text(self) -> str:
        if self._size <= MOST_CHARACTERS:
            return self._head + self._rest
        left_out = self._size - MOST_CHARACTERS
        return f"{self._head}\n[… {left_out:,} characters are left out here …]\n{self._rest}"

    @property
    def is_whole(self) -> bool:
        return self._size <= MOST_CHARACTERS
