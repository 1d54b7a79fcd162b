"""Vision-language judges of four-choice questions: what they are shown, how they are asked, and what they replied.

A judge is anything with a name that turns a prompt and pictures into text. Two are here: a model that `transformers`
loads, and any server that speaks the chat completions protocol of OpenAI.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import cv2
import httpx
import numpy as np
import torch
from jaxtyping import Int
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature

from physnb.config import require
from physnb.metrics.questions import LETTERS, VIDEO_SUFFIXES, Media, Question, Reply

VIDEO_FRAMES = 8  # shown of a video, evenly spaced: PhysBench's default
SHEET_FRAMES = 4  # of a contact sheet, 2 x 2
SHEET_GAP = 10  # pixels of white between the frames of a sheet
SMALLEST_SIDE = 224  # pixels; smaller pictures are enlarged by whole factors, so that a small disc stays a disc
INSTRUCTION = "Reply with a single letter and nothing else: A, B, C or D, whichever option is right."
MAX_FAILURES = 10  # in a row, after which a judge is taken to be gone


class JudgeError(RuntimeError):
    """A judge that could not be asked or gave no text; the message says why."""


class Judge(Protocol):
    """name: which judge this is, stored beside its replies. single_image: whether it takes one picture at a time."""

    name: str
    single_image: bool

    def __call__(self, prompt: str, images: list[Image.Image]) -> str:
        """The judge's reply, as it came."""


def even_frames(total: int, count: int) -> Int[np.ndarray, " frame"]:
    """Indices of `count` frames evenly spaced from the first to the last, all of them where there are fewer."""
    return np.rint(np.linspace(0, total - 1, min(count, total))).astype(int)


def sheet_frames(total: int) -> Int[np.ndarray, " frame"]:
    """Indices of the four frames of a contact sheet: every (total // 4)th from the first, as PhysBench takes them."""
    require(total >= SHEET_FRAMES, f"a contact sheet needs a video of {SHEET_FRAMES} frames, got {total}")
    return np.arange(SHEET_FRAMES) * (total // SHEET_FRAMES)


def contact_sheet(images: list[Image.Image], labels: Iterable[str] = ("1", "2", "3", "4")) -> Image.Image:
    """Four pictures in two rows of two, labelled in their upper left corners, with white gaps of 10 pixels.

    All take the largest width and height among them. Raises ValueError unless there are four.
    """
    require(len(images) == 4, f"a contact sheet needs 4 pictures, got {len(images)}")
    width, height = max(i.width for i in images), max(i.height for i in images)
    sheet = Image.new("RGB", (2 * width + SHEET_GAP, 2 * height + SHEET_GAP), "white")
    draw = ImageDraw.Draw(sheet)
    size = max((width + height) // 24, 8)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = number % 2 * (width + SHEET_GAP), number // 2 * (height + SHEET_GAP)
        sheet.paste(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (left, top))
        corner = sheet.crop((left, top, left + size + 10, top + size + 10)).convert("L")
        ink = "black" if np.asarray(corner).mean() > 127 else "white"
        draw.text((left + 10, top + 10), label, fill=ink, font=ImageFont.load_default(size))
    return sheet


def _is_video(media: Media) -> bool:
    return media.suffix.lower() in VIDEO_SUFFIXES if isinstance(media, Path) else len(media) > 1


def _pictures(media: Media, single_image: bool) -> list[Image.Image]:
    """What a judge sees of one image or video: every picture at least SMALLEST_SIDE pixels wide and high."""
    choose_frames = sheet_frames if single_image else lambda total: even_frames(total, VIDEO_FRAMES)
    if not isinstance(media, Path):
        require(media.ndim == 4 and len(media) > 0, f"media must be [time, height, width, 3], got {tuple(media.shape)}")
        chosen = choose_frames(len(media)) if len(media) > 1 else [0]
        images = [Image.fromarray(media[i].numpy(force=True)) for i in chosen]
    elif not media.is_file():
        raise ValueError(f"media {media} is missing")
    elif _is_video(media):
        images = _video_frames(media, choose_frames)
    else:
        try:
            images = [ImageOps.exif_transpose(Image.open(media)).convert("RGB")]
        except OSError as error:
            raise ValueError(f"media {media} cannot be decoded ({error})") from None
    factors = [-(-SMALLEST_SIDE // min(image.size)) for image in images]
    return [
        i if f == 1 else ImageOps.scale(i, f, Image.Resampling.NEAREST) for i, f in zip(images, factors, strict=True)
    ]


def _video_frames(path: Path, choose_frames) -> list[Image.Image]:
    """The chosen frames of a video; it is read twice, because the frame count in a file's header can be wrong."""
    reader = cv2.VideoCapture(str(path))
    total = 0
    while reader.grab():
        total += 1
    reader.release()
    require(total > 0, f"media {path} holds no frame that can be decoded")
    wanted, images = set(choose_frames(total).tolist()), []
    reader = cv2.VideoCapture(str(path))
    for index in range(max(wanted) + 1):
        reader.grab()
        if index in wanted:
            images.append(Image.fromarray(cv2.cvtColor(reader.retrieve()[1], cv2.COLOR_BGR2RGB)))
    reader.release()
    return images


def show(question: Question, single_image: bool = False) -> tuple[str, list[Image.Image]]:
    """The prompt and the pictures of a question: its text, a newline, and an instruction to reply with one letter.

    Of a video 8 evenly spaced frames are shown; of four option pictures, all. Placeholders in the text become
    "[image 3]" or "[images 1 to 8: frames of a video, in order]"; media without one are explained in a first line.
    single_image: one video becomes a 2 x 2 sheet of 4 numbered frames, and option pictures a sheet labelled A to D to
    the right of it. Raises ValueError for missing or damaged media, placeholders that do not match the media, a video
    too short for a sheet, and several media where only one picture can be shown.
    """
    places = re.findall(r"<(image|video)>", question.text)
    expected = ["video" if _is_video(media) else "image" for media in question.media]
    require(
        not places or places == expected,
        f"question {question.id}: placeholders {places} do not match its media {expected}",
    )
    if single_image:
        pictures, names = _one_picture(question)
    else:
        pictures, names = [], []
        for media in question.media:
            new = _pictures(media, single_image=False)
            first, last = len(pictures) + 1, len(pictures) + len(new)
            names.append(f"images {first} to {last}: frames of a video, in order" if len(new) > 1 else f"image {first}")
            pictures += new
        if question.option_media:
            names.append(f"images {len(pictures) + 1} to {len(pictures) + 4}: the options A, B, C and D")
            pictures += [_pictures(media, single_image=False)[0] for media in question.option_media]
    text = question.text
    if places:
        text = re.sub(r"<(?:image|video)>", lambda _: f"[{names.pop(0)}]", text)
    preface = "".join(f"[{name}]\n" for name in names)
    return f"{preface}{text}\n{INSTRUCTION}", pictures


def _one_picture(question: Question) -> tuple[list[Image.Image], list[str]]:
    """All that a question shows in one picture, and what it is."""
    require(
        len(question.media) <= 1, f"question {question.id}: {len(question.media)} media cannot be shown in one picture"
    )
    parts, names = [], []
    for media in question.media:
        frames = _pictures(media, single_image=True)
        video = len(frames) > 1
        parts.append(contact_sheet(frames) if video else frames[0])
        names.append("the image: frames 1 to 4 of a video, in order" if video else "the image")
    if question.option_media:
        parts.append(contact_sheet([_pictures(m, single_image=True)[0] for m in question.option_media], LETTERS))
        names.append("to the right in the image: the options A, B, C and D" if question.media else "the image: A to D")
    size = sum(p.width for p in parts) + SHEET_GAP * (len(parts) - 1), max((p.height for p in parts), default=0)
    whole, left = Image.new("RGB", size, "white") if parts else None, 0
    for part in parts:
        whole.paste(part, (left, 0))
        left += part.width + SHEET_GAP
    return [whole] if parts else [], names


def ask(judge: Judge, question: Question) -> str:
    """What `judge` replies to the question, as it came; `physnb.metrics.questions.read_choice` reads the letter."""
    return judge(*show(question, judge.single_image))


def judge_questions(judge: Judge, questions: Iterable[Question], file: Path | None = None) -> list[Reply]:
    """A reply to every question, in their order; a question that fails has None and the reason, and the run goes on.

    file: JSON lines, each forced to disk as its reply comes. A run that was killed goes on where it stopped: what has a
    reply is not asked again, what failed is. A line cut off by the kill is dropped; of repeated lines the last that has
    a reply counts.
    Raises ValueError for a file of another judge, of other questions (another prompt or other pictures), or with a
    damaged line, and JudgeError after 10 failures in a row: the replies until then are in the file.
    """
    known = {} if file is None else _stored_replies(Path(file), judge.name)
    replies, failures = [], 0
    for question in questions:
        stored = known.get(question.id)
        row = dict(id=question.id, judge=judge.name, asked=None, reply=None, reason=None)
        try:
            prompt, images = show(question, judge.single_image)
            row["asked"] = _fingerprint(prompt, images)
            if stored is None:
                row["reply"], failures = judge(prompt, images), 0
        except ValueError as error:  # this question cannot be shown
            row["reason"] = str(error)
        except Exception as error:  # whatever a model or a server does, the other questions are still asked
            row["reason"], failures = f"{type(error).__name__}: {error}", failures + 1
        if stored is not None:
            require(stored["asked"] == row["asked"], f"{file}: question {question.id} was another one; use a new file")
            row = stored
        elif file is not None:
            with Path(file).open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
                out.flush()
                os.fsync(out.fileno())
        replies.append(Reply(question.id, row["reply"], row["reason"]))
        if failures == MAX_FAILURES:
            raise JudgeError(f"{judge.name} failed {failures} times in a row, the last time with {row['reason']}")
    return replies


def _fingerprint(prompt: str, images: list[Image.Image]) -> str:
    """Digest of what a judge is shown."""
    digest = hashlib.sha256(prompt.encode())
    for image in images:
        digest.update(f"{image.size}".encode() + image.tobytes())
    return digest.hexdigest()


def _stored_replies(file: Path, judge: str) -> dict[str, dict[str, Any]]:
    """Rows that have a reply, by question; a last line without an end is cut off the file."""
    if not file.exists():
        return {}
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(file, len(whole))
    rows = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            name, question, reply, _, _ = (row[key] for key in ("judge", "id", "reply", "asked", "reason"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} line {number} is no reply of a judge ({error}); delete or mend it") from None
        require(name == judge, f"{file} has replies of {name}, not of {judge}; use a new file")
        if reply is not None:
            rows[question] = row
    return rows


class TransformersJudge:
    """An image-text-to-text model of `transformers`, by folder or hub id, that replies greedily.

    Weights are safetensors and no code of the model's own is run. A folder is read without any network.
    Raises ValueError for what cannot be loaded: no such folder or model, other weights, no chat template.
    """

    def __init__(
        self,
        model_id_or_path: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        max_new_tokens: int = 16,
        single_image: bool = False,
    ):
        self.name, self.single_image, self.max_new_tokens = str(model_id_or_path), single_image, max_new_tokens
        local = Path(model_id_or_path).is_dir()
        try:
            self.model = AutoModelForImageTextToText.from_pretrained(
                model_id_or_path, dtype=dtype, use_safetensors=True, local_files_only=local
            )
            self.processor = AutoProcessor.from_pretrained(model_id_or_path, local_files_only=local)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{self.name} cannot be loaded as an image-text-to-text model with safetensors weights ({error})"
            ) from None
        require(
            getattr(self.processor, "chat_template", None) is not None,
            f"{self.name} has no chat template; take an instruction-tuned model",
        )
        self.model.to(device).eval()

    def encode(self, prompt: str, images: list[Image.Image]) -> BatchFeature:
        """The model's inputs: one turn of the user, the pictures before the words."""
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": prompt}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return inputs.to(self.model.device, dtype=self.model.dtype)

    @torch.inference_mode()
    def __call__(self, prompt: str, images: list[Image.Image]) -> str:
        inputs = self.encode(prompt, images)
        tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
        return self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


@dataclass(frozen=True)
class EndpointJudge:
    """A model behind a server of the chat completions protocol (POST url/chat/completions), pictures as PNG data URLs.

    url: the base, for example https://host/v1. api_key_variable: the environment variable that holds the key; the key
    is read for each call and kept nowhere, and is blotted out of error messages; redirects are not followed.
    timeout_s: longest silence of the server. retries: further tries after a timeout, a refused connection, HTTP 429 or
    5xx, after a wait that doubles from wait_s. settings: further fields of the request.
    Raises ValueError for a bad url or an unset variable, JudgeError naming what went wrong in a call.
    """

    url: str
    model: str
    api_key_variable: str | None = None
    timeout_s: float = 60.0
    retries: int = 2
    wait_s: float = 1.0
    single_image: bool = False
    settings: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 16})

    def __post_init__(self) -> None:
        try:
            parts = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ValueError(f"the endpoint's URL is not valid ({error})") from None
        require(not parts.userinfo, "the endpoint's URL must not hold a name or password; use api_key_variable")
        require(parts.scheme in ("http", "https") and bool(parts.host), f"endpoint {self.url!r} must be an http(s) URL")
        require(self.timeout_s > 0 and self.retries >= 0, "timeout_s must be positive and retries not negative")
        self._key()

    @property
    def name(self) -> str:
        return f"{self.model} at {self.url}"

    def _key(self) -> str:
        if self.api_key_variable is None:
            return ""
        key = os.environ.get(self.api_key_variable, "")
        good = bool(key) and key.isascii() and key.isprintable() and " " not in key
        require(good, f"environment variable {self.api_key_variable} does not hold an API key; set it")
        return key

    def __call__(self, prompt: str, images: list[Image.Image]) -> str:
        content = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
        content.append({"type": "text", "text": prompt})
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **self.settings}
        key = self._key()
        for attempt in range(self.retries + 1):
            time.sleep(self.wait_s * 2 ** (attempt - 1) if attempt else 0)
            try:
                return self._post(body, key)
            except _TryAgain as error:
                problem = error
        raise JudgeError(f"{problem} ({self.retries + 1} tries)")

    def _post(self, body: dict[str, Any], key: str) -> str:
        """One call; raises _TryAgain for what may pass and JudgeError for what will not."""
        url, headers = f"{self.url.rstrip('/')}/chat/completions", {"Authorization": f"Bearer {key}"} if key else {}
        try:
            answer = httpx.post(url, json=body, headers=headers, timeout=self.timeout_s)
        except httpx.TimeoutException:
            raise _TryAgain(f"no answer within {self.timeout_s:g} s") from None
        except httpx.TransportError as error:
            raise _TryAgain(f"no connection to {self.url} ({_without(key, repr(error))})") from None
        said = _without(key, answer.text)
        if answer.status_code != 200:
            passing = answer.status_code == 429 or answer.status_code >= 500
            raise (_TryAgain if passing else JudgeError)(f"HTTP {answer.status_code}: {said[:200]}")
        try:
            text = json.loads(said)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise JudgeError(f"answer without choices[0].message.content: {said[:200]!r}") from None
        if not isinstance(text, str):
            raise JudgeError(f"answer whose content is no text: {text!r}")
        return text


class _TryAgain(JudgeError):
    """A failure that may pass."""


def _without(key: str, message: str) -> str:
    """`message` without the API key, which servers like to repeat."""
    return message.replace(key, "[key]") if key else message


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
