import base64
import io
import json
import os
import signal
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from physnb.data import simulate
from physnb.metrics.judges import (
    INSTRUCTION,
    MAX_FAILURES,
    EndpointJudge,
    JudgeError,
    TransformersJudge,
    ask,
    contact_sheet,
    even_frames,
    judge_questions,
    sheet_frames,
    show,
)
from physnb.metrics.question_making import make_questions
from physnb.metrics.questions import LETTERS, Question, option_lines, read_choice, score_answers

OPTIONS = ("up", "down", "left", "right")
KEY = "sk-secret-0123456789"


def question(name="q", media=(), text="Which way?", **other) -> Question:
    return Question(name, f"{text}\n{option_lines(OPTIONS)}", OPTIONS, "B", tuple(media), **other)


def grey_video(frames=16, size=32) -> torch.Tensor:
    """Frame k is grey 10 k all over."""
    return (10 * torch.arange(frames))[:, None, None, None].expand(frames, size, size, 3).byte().contiguous()


def grey_of(image: Image.Image) -> int:
    """Grey in the middle of a picture."""
    return image.getpixel((image.width // 2, image.height // 2))[0]


class Scripted:
    """A judge that replies from a list, or raises what is in it."""

    def __init__(self, *replies, name="scripted", single_image=False):
        self.replies, self.name, self.single_image, self.seen = list(replies), name, single_image, []

    def __call__(self, prompt, images):
        self.seen.append((prompt, images))
        reply = self.replies.pop(0)
        if isinstance(reply, BaseException):
            raise reply
        return reply


# --- what is shown ---


def test_frames_are_spread_from_the_first_to_the_last():
    assert even_frames(16, 8).tolist() == [0, 2, 4, 6, 9, 11, 13, 15]
    assert even_frames(3, 8).tolist() == [0, 1, 2] and even_frames(1, 8).tolist() == [0]
    assert sheet_frames(16).tolist() == [0, 4, 8, 12] and sheet_frames(7).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="a contact sheet needs a video of 4 frames, got 3"):
        sheet_frames(3)


def test_a_video_is_shown_as_eight_enlarged_frames_and_the_prompt_ends_in_the_instruction():
    prompt, images = show(question(media=[grey_video()]))
    assert [grey_of(i) for i in images] == [0, 20, 40, 60, 90, 110, 130, 150]
    assert all(i.size == (224, 224) for i in images)
    text = question().text
    assert prompt == f"[images 1 to 8: frames of a video, in order]\n{text}\n{INSTRUCTION}"


def test_placeholders_become_references_in_their_place():
    mixed = question(media=[grey_video(1), grey_video()], text="Before <image> and after <video>?")
    prompt, images = show(mixed)
    assert prompt.startswith("Before [image 1] and after [images 2 to 9: frames of a video, in order]?\nA. up")
    assert len(images) == 9
    with pytest.raises(ValueError, match=r"question q: placeholders \['image'\] do not match its media \['video'\]"):
        show(question(media=[grey_video()], text="<image>?"))


def test_single_image_judges_get_a_sheet_of_four_numbered_frames_with_white_gaps():
    prompt, (sheet,) = show(question(media=[grey_video()], text="<video> Which?"), single_image=True)
    assert prompt.startswith("[the image: frames 1 to 4 of a video, in order] Which?")
    assert sheet.size == (2 * 224 + 10, 2 * 224 + 10)
    pixels = np.asarray(sheet)
    assert (pixels[224:234] == 255).all() and (pixels[:, 224:234] == 255).all()
    corners = [pixels[y : y + 224, x : x + 224] for y in (0, 234) for x in (0, 234)]
    assert [int(c[112, 112, 0]) for c in corners] == [0, 40, 80, 120]
    assert all(len(np.unique(c[:40, :40])) > 1 for c in corners)  # a number is written there
    assert not np.array_equal(corners[0][:40, :40] > 0, corners[1][:40, :40] > 40)
    _, (picture,) = show(question(media=[grey_video(1)]), single_image=True)
    assert picture.size == (224, 224)


def test_option_pictures_follow_the_media_or_stand_beside_the_sheet():
    futures = tuple(grey_video()[i : i + 1] for i in range(4))
    asked = question(media=[grey_video()], option_media=futures)
    prompt, images = show(asked)
    assert len(images) == 12 and [grey_of(i) for i in images[8:]] == [0, 10, 20, 30]
    assert "[images 9 to 12: the options A, B, C and D]" in prompt
    prompt, (whole,) = show(asked, single_image=True)
    assert whole.size == (2 * 458 + 10, 458) and "to the right in the image: the options A, B, C and D" in prompt
    _, (alone,) = show(question(option_media=futures), single_image=True)
    assert alone.size == (458, 458)


def test_several_pictures_do_not_fit_into_one_and_text_alone_needs_none():
    with pytest.raises(ValueError, match="question q: 2 media cannot be shown in one picture"):
        show(question(media=[grey_video(1), grey_video(1)]), single_image=True)
    assert show(question(), single_image=True)[1] == [] and show(question())[1] == []


def test_a_sheet_takes_four_pictures_of_any_size():
    sheet = contact_sheet([Image.new("L", (20, 30)), *[Image.new("RGB", (40, 10))] * 3], LETTERS)
    assert sheet.size == (90, 70)
    with pytest.raises(ValueError, match="a contact sheet needs 4 pictures, got 3"):
        contact_sheet([Image.new("RGB", (8, 8))] * 3)


def test_files_are_read_as_frames_are(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "v.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 48))
    for frame in grey_video(16, 64)[:, :48]:
        writer.write(frame.numpy())
    writer.release()
    Image.new("RGB", (300, 250), (200, 0, 0)).save(tmp_path / "p.JPG")
    _, images = show(question(media=[tmp_path / "v.mp4", tmp_path / "p.JPG"]))
    assert len(images) == 9 and images[8].size == (300, 250)
    assert [grey_of(i) for i in images[:8]] == pytest.approx([0, 20, 40, 60, 90, 110, 130, 150], abs=6)  # codec
    assert images[0].size == (320, 240)


@pytest.mark.parametrize(
    ("name", "message"), [("gone.mp4", "is missing"), ("bad.mp4", "no frame"), ("bad.png", "cannot")]
)
def test_missing_and_damaged_media_are_named(tmp_path, name, message):
    for bad in ("bad.mp4", "bad.png"):
        (tmp_path / bad).write_bytes(b"nothing of the sort")
    with pytest.raises(ValueError, match=rf"media .*{name} .*{message}"):
        show(question(media=[tmp_path / name]))


def test_media_without_frames_are_refused():
    for frames in (torch.empty(0, 8, 8, 3, dtype=torch.uint8), torch.zeros(8, 8, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"media must be \[time, height, width, 3\]"):
            show(question(media=[frames]))


def test_made_questions_can_be_shown_and_a_judge_that_knows_scores_one():
    made = make_questions(simulate("collision", "id", range(4), frames=16, size=32)).questions
    for single in (False, True):
        judge = Scripted(*(q.answer for q in made), single_image=single)
        found = score_answers(made, judge_questions(judge, made))
        assert found.overall.mean == 1 and len(judge.seen) == len(made) >= 8
    assert ask(Scripted("C"), made[0]) == "C"


# --- a run of many questions ---


def test_failures_are_reasons_and_the_run_goes_on(tmp_path):
    questions = [question("a"), question("b", [tmp_path / "gone.png"]), question("c"), question("d")]
    judge = Scripted("B", JudgeError("HTTP 500"), "what?")
    replies = judge_questions(judge, questions, tmp_path / "replies.jsonl")
    assert [r.text for r in replies] == ["B", None, None, "what?"]
    assert "gone.png is missing" in replies[1].reason and replies[2].reason == "JudgeError: HTTP 500"
    found = score_answers(questions, replies)
    assert found.scores.values.tolist() == [1, 0, 0, 0] and found.unread.keys() == {"b", "c", "d"}


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    questions, file = [question(str(i)) for i in range(5)], tmp_path / "replies.jsonl"
    with pytest.raises(KeyboardInterrupt):
        judge_questions(Scripted("A", RuntimeError("out of memory"), "C", KeyboardInterrupt()), questions, file)
    assert len(file.read_text().splitlines()) == 3
    with file.open("a") as out:
        out.write('{"id": "3", "judge": "scr')  # cut off by a kill
    second = Scripted("B", "D", "A")  # for the one that failed and the two that were not asked
    replies = judge_questions(second, questions, file)
    assert [r.text for r in replies] == ["A", "B", "C", "D", "A"] and len(second.seen) == 3
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["0", "1", "2", "1", "3", "4"]
    file.write_text(file.read_text() * 2)  # repeated lines change nothing
    assert judge_questions(Scripted(), questions, file) == replies


class Killed(Scripted):
    """Ends its own process at the third question, as a full machine would."""

    def __call__(self, prompt, images):
        if len(self.seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(prompt, images)


def test_a_killed_process_leaves_whole_replies(tmp_path):
    file, questions = tmp_path / "replies.jsonl", [question(str(i)) for i in range(5)]
    child = os.fork()
    if child == 0:
        try:
            judge_questions(Killed("A", "A"), questions, file)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [r.text for r in judge_questions(Scripted("B", "B", "B"), questions, file)] == list("AABBB")


def test_replies_of_others_and_to_others_are_refused(tmp_path):
    file = tmp_path / "replies.jsonl"
    judge_questions(Scripted("A"), [question("1", [grey_video()])], file)
    with pytest.raises(ValueError, match="has replies of scripted, not of another"):
        judge_questions(Scripted(name="another"), [question("1", [grey_video()])], file)
    for other in (question("1", [grey_video().flip(0)]), question("1", [grey_video()], text="Why?")):
        with pytest.raises(ValueError, match="question 1 was another one; use a new file"):
            judge_questions(Scripted(), [other], file)
    for line in ("nonsense", "[1]", '{"id": "1"}'):
        file.write_text(line + "\n")
        with pytest.raises(ValueError, match="line 1 is no reply of a judge"):
            judge_questions(Scripted(), [question("1")], file)


def test_a_judge_that_is_gone_ends_the_run(tmp_path):
    judge = Scripted(*[JudgeError("refused")] * 20)
    with pytest.raises(
        JudgeError, match=f"scripted failed {MAX_FAILURES} times in a row, the last time with .*refused"
    ):
        judge_questions(judge, [question(str(i)) for i in range(20)], tmp_path / "replies.jsonl")
    assert len(judge.seen) == MAX_FAILURES == len((tmp_path / "replies.jsonl").read_text().splitlines())
    gone = [question(str(i), [tmp_path / "gone.png"]) for i in range(20)]  # not the judge's fault
    assert all(r.text is None for r in judge_questions(Scripted(), gone))


# --- a real model, tiny and random ---

WORDS = "<unk> <pad> <s> </s> <image> A B C D which way user assistant up down left right . : [ ]".split()
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    """A LLaVA of 15,000 random weights with its processor, saved as `transformers` saves them."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **sizes),
        text_config=LlamaConfig(vocab_size=len(WORDS), bos_token_id=2, eos_token_id=3, pad_token_id=1, **sizes),
        image_token_id=WORDS.index("<image>"),
    )
    model = LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    folder = tmp_path_factory.mktemp("judge") / "llava"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_pictures_reach_the_model_and_greedy_replies_repeat(vision_model):
    judge = TransformersJudge(vision_model, max_new_tokens=6)
    prompt, images = show(question(media=[grey_video()]))
    inputs = judge.encode(prompt, images)
    assert inputs["pixel_values"].shape == (8, 3, 16, 16)
    assert (inputs["input_ids"] == WORDS.index("<image>")).sum() == 8 * 4  # four patches a picture
    with torch.inference_mode():
        logits = judge.model(**inputs).logits[0, -1]
        assert torch.equal(judge.model(**judge.encode(prompt, images)).logits[0, -1], logits)
        for other in ([*images[:-1], Image.new("RGB", (224, 224), "red")], images[::-1]):
            assert not torch.allclose(judge.model(**judge.encode(prompt, other)).logits[0, -1], logits, atol=1e-4)
    reply = judge(prompt, images)
    assert reply == judge(prompt, images) == TransformersJudge(vision_model, max_new_tokens=6)(prompt, images)
    assert 0 < len(reply.split()) <= 6 and set(reply.split()) <= set(WORDS)


def test_a_model_of_random_weights_is_judged_like_any_other(vision_model):
    judge = TransformersJudge(vision_model, single_image=True, max_new_tokens=4)
    questions = [question(str(i), [grey_video().roll(i, 0)]) for i in range(3)]
    replies = judge_questions(judge, questions)
    found = score_answers(questions, replies)
    assert found.overall.cases == 3
    assert found.unread.keys() == {r.id for r in replies if read_choice(r.text) is None}
    assert judge.name == str(vision_model)


def copied(folder, target, leave_out=()):
    target.mkdir()
    for path in folder.iterdir():
        if path.name not in leave_out:
            (target / path.name).write_bytes(path.read_bytes())
    return target


def test_only_safetensors_with_a_chat_template_are_loaded(vision_model, tmp_path):
    pickled = copied(vision_model, tmp_path / "pickled", {"model.safetensors"})
    torch.save(load_file(vision_model / "model.safetensors"), pickled / "pytorch_model.bin")
    silent = copied(vision_model, tmp_path / "silent", {"chat_template.jinja"})
    plain = copied(vision_model, tmp_path / "plain")
    (plain / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "empty").mkdir()
    for folder in (pickled, plain, tmp_path / "empty"):
        with pytest.raises(
            ValueError, match="cannot be loaded as an image-text-to-text model with safetensors weights"
        ):
            TransformersJudge(folder)
    with pytest.raises(ValueError, match="has no chat template"):
        TransformersJudge(silent)


# --- a server ---


class Handler(BaseHTTPRequestHandler):
    """Does what the server's script says next, and keeps what it was asked."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, dict(self.headers), json.loads(body)))
        status, text = self.server.script.pop(0)
        if status == "sleep":
            time.sleep(text)
            status, text = 200, said("A")
        self.send_response(status)
        if status == 302:
            self.send_header("Location", text)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


def said(content) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.script, server.asked = [], []
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def judge_at(server, **settings) -> EndpointJudge:
    return EndpointJudge(server.url, "tiny-vlm", **dict(timeout_s=5, retries=0, wait_s=0.01) | settings)


def test_the_request_holds_prompt_pictures_and_key_and_the_reply_is_the_text(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.script = [(200, said("B."))]
    judge = judge_at(server, api_key_variable="JUDGE_KEY")
    assert ask(judge, question(media=[grey_video()])) == "B."
    ((path, headers, body),) = server.asked
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"]) == ("tiny-vlm", 0)
    (message,) = body["messages"]
    *pictures, text = message["content"]
    assert text["text"].endswith(INSTRUCTION) and len(pictures) == 8
    head, data = pictures[1]["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    assert grey_of(Image.open(io.BytesIO(base64.b64decode(data)))) == 20  # lossless
    assert KEY not in repr(judge) and KEY not in judge.name


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((500, "boom"), "JudgeError: HTTP 500: boom (1 tries)"),
        ((404, "no such model"), "JudgeError: HTTP 404: no such model"),
        ((302, "http://127.0.0.1:9/v1"), "JudgeError: HTTP 302"),
        ((200, "not json"), "JudgeError: answer without choices[0].message.content: 'not json'"),
        ((200, '{"choices": []}'), "JudgeError: answer without choices[0].message.content"),
        ((200, said(None)), "JudgeError: answer whose content is no text: None"),
        (("sleep", 0.6), "JudgeError: no answer within 0.3 s"),
    ],
)
def test_every_failure_of_a_server_is_a_reason_and_the_next_question_is_asked(server, answer, reason):
    server.script = [answer, (200, said("B")), (200, said("nonsense"))]
    questions = [question(name) for name in "abc"]
    replies = judge_questions(judge_at(server, timeout_s=0.3 if answer[0] == "sleep" else 5), questions)
    assert replies[0].reason.startswith(reason)
    assert [r.text for r in replies[1:]] == ["B", "nonsense"]
    found = score_answers(questions, replies)
    assert found.scores.values.tolist() == [0, 1, 0] and found.unread.keys() == {"a", "c"}


def test_what_may_pass_is_tried_again_and_what_will_not_is_not(server):
    server.script = [(503, "busy"), (429, "slow down"), (200, said("C"))]
    assert judge_at(server, retries=2)("Which?", []) == "C" and len(server.asked) == 3
    server.script = [(400, "bad request"), (200, said("C"))]
    with pytest.raises(JudgeError, match="HTTP 400: bad request"):
        judge_at(server, retries=2)("Which?", [])
    assert len(server.asked) == 4


def test_a_refused_connection_is_named(server):
    judge = replace(judge_at(server), url="http://127.0.0.1:9/v1", retries=1)
    with pytest.raises(JudgeError, match=r"no connection to http://127\.0\.0\.1:9/v1 .*\(2 tries\)"):
        judge("Which?", [])


def test_the_key_is_in_no_reason_and_no_file(server, monkeypatch, tmp_path):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    echo = "x" * 190 + KEY  # a cut through the key would leave half of it
    server.script = [(401, echo), (500, echo), (200, echo), (200, said(f"Your key is {KEY}"))]
    file = tmp_path / "replies.jsonl"
    replies = judge_questions(judge_at(server, api_key_variable="JUDGE_KEY"), [question(n) for n in "abcd"], file)
    text = file.read_text() + repr(replies)
    assert "sk-secret" not in text and "[key]" in text
    monkeypatch.setenv("JUDGE_KEY", KEY + "\nX-Header: 1")  # no header can hold this
    with pytest.raises(ValueError, match="JUDGE_KEY does not hold an API key") as caught:
        judge_at(server, api_key_variable="JUDGE_KEY")
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(url="ftp://host/v1"), r"endpoint 'ftp://host/v1' must be an http\(s\) URL"),
        (dict(url="host"), r"must be an http\(s\) URL"),
        (dict(url="http://host:port/v1"), "is not valid"),
        (dict(url=f"http://me:{KEY}@host/v1"), "must not hold a name or password"),
        (
            dict(api_key_variable="PHYSNB_NO_SUCH_KEY"),
            "environment variable PHYSNB_NO_SUCH_KEY does not hold an API key",
        ),
        (dict(timeout_s=0), "timeout_s must be positive"),
        (dict(retries=-1), "retries not negative"),
    ],
)
def test_bad_endpoints_are_refused_before_any_call(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        EndpointJudge(**dict(url="http://host/v1", model="m") | settings)
    assert KEY not in str(caught.value)


def test_the_environment_is_left_alone(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    before = dict(os.environ)
    server.script = [(200, said("A"))]
    judge_at(server, api_key_variable="JUDGE_KEY")("Which?", [])
    assert dict(os.environ) == before
