"""The model class for lmms-eval, run against a small stand-in with the shape of lmms-eval 0.7.2."""

from __future__ import annotations

import abc
import importlib
import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from PIL import Image
from tests.run.small_run import SIZES, TOKENS, write_model, write_rows

from trimtab import DualSpeedConfig, prune_for_inference
from trimtab.errors import DataError, MissingExtraError, SettingError, UnsupportedModelError
from trimtab.integrations import lmms_eval as module
from trimtab.run.load import load_trained

ROOT = Path(__file__).parents[2]


class Lmms(abc.ABC):
    """Stand-in for ``lmms_eval.api.model.lmms``."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = Hook()
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: list[Any]) -> list[Any]: ...

    @abc.abstractmethod
    def generate_until(self, requests: list[Any]) -> list[str]: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: list[Any]) -> list[str]: ...

    @staticmethod
    def _resolve_system_prompt(value: str) -> str:
        return Path(value).read_text().strip() if Path(value).is_file() else value

    def _apply_system_prompt(self, messages: list[Any], system: str) -> list[Any]:
        return [{"role": "system", "content": [{"type": "text", "text": system}]}, *messages]

    @classmethod
    def create_from_arg_string(cls, arguments: str, more: dict[str, Any]) -> Any:
        given = dict(pair.split("=", 1) for pair in arguments.split(","))
        numbers = {name: float(value) for name, value in given.items() if value.replace(".", "", 1).isdecimal()}
        return cls(**{**given, **numbers}, **{name: value for name, value in more.items() if value is not None})

    def clean(self) -> None:
        del self.model


class Hook:
    def __init__(self) -> None:
        self.seen: list[tuple[str, Any, str]] = []

    def add_partial(self, name: str, request: Any, answer: str) -> None:
        self.seen.append((name, request, answer))


@dataclass
class Instance:
    arguments: tuple[Any, ...]
    resps: list[str] = field(default_factory=list)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


@dataclass
class ChatMessages:
    messages: list[dict[str, Any]]

    def extract_media(self) -> tuple[list[Any], list[Any], list[Any]]:
        parts = [part for message in self.messages for part in message["content"]]
        return tuple([part["url"] for part in parts if part["type"] == kind] for kind in ("image", "video", "audio"))  # type: ignore[return-value]

    def to_hf_messages(self) -> list[dict[str, Any]]:
        def turned(part: dict[str, Any]) -> dict[str, Any]:
            return part if part["type"] == "text" else {"type": part["type"], part["type"]: part["url"]}

        return [{"role": one["role"], "content": [turned(part) for part in one["content"]]} for one in self.messages]


@pytest.fixture
def lmms_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the stand-in where the package would be."""
    parts = {
        "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": Lmms}, "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.protocol": {"ChatMessages": ChatMessages},
    }  # fmt: skip
    for name, values in parts.items():
        made = types.ModuleType(name)
        vars(made).update(values)
        monkeypatch.setitem(sys.modules, name, made)
    module._model_class.cache_clear()
    yield
    module._model_class.cache_clear()


Make = Callable[..., Any]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model that no run trained, and pictures."""
    folder = tmp_path_factory.mktemp("bare")
    write_model(folder / "model")
    write_rows(folder / "test.jsonl", "test", 4)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of a run whose weights are so wide that answers depend on images and settings."""
    from trimtab import attach
    from trimtab.data.scenes import vocabulary
    from trimtab.quickstart.model import build_model, build_processor

    folder = tmp_path_factory.mktemp("wide")
    processor = build_processor(SIZES, vocabulary())
    model = build_model(SIZES, processor.tokenizer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                fan_in = math.prod(parameter.shape[1:])
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in))
    handle = attach(model, DualSpeedConfig(keep_ratio=0.25, isolator_tokens=2))
    handle.save_pretrained(folder / "dualspeed")
    handle.detach()
    model.save_pretrained(str(folder))
    processor.save_pretrained(str(folder))
    return folder


@pytest.fixture
def make(lmms_eval: None, trained: Path) -> Make:
    """Return a function that makes the model as lmms-eval does, from a string of arguments."""

    def build(arguments: str = "", **more: Any) -> Any:
        chosen = f"pretrained={trained}" + (f",{arguments}" if arguments else "")
        return module.TrimtabPruned.create_from_arg_string(chosen, {"batch_size": 2, "device": "cpu", **more})

    return build


def documents(small_run: Path, *counts: int) -> list[dict[str, Any]]:
    """Return documents with that many images each."""
    pictures = [Image.open(path).convert("RGB") for path in sorted(small_run.glob("test-*.png"))]
    questions = ["which digit is red ?", "what colour is left ?", "how many ?"]
    return [
        {
            "images": [pictures[(number + image) % len(pictures)] for image in range(count)],
            "text": questions[number % 3],
        }
        for number, count in enumerate(counts)
    ]


def to_messages(document: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": image} for image in document["images"]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": document["text"]}]}]


def ask(model: Any, docs: list[dict[str, Any]], *settings: dict[str, Any], messages: Any = to_messages) -> list[str]:
    model.task_dict = {"scenes": {"test": docs}}
    requests = [
        Instance((doc["text"], messages, dict(settings[number % len(settings)]), number, "scenes", "test"))
        for number, doc in enumerate(docs)
    ]
    return list(model.generate_until(requests))


def answer_by_hand(trained: Path, doc: dict[str, Any], config: DualSpeedConfig | None = None, tokens: int = 5) -> str:
    """Answer one document alone, with the pruned view of its own batch."""
    from trimtab.run.config import RunConfig

    run = RunConfig(model_name_or_path=str(trained), data_files=["none"], output_dir=str(trained))
    model, processor = load_trained(trained, run)
    chat = ChatMessages(to_messages(doc)).to_hf_messages()
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    images = {"images": doc["images"]} if doc["images"] else {}
    given = processor(text=[text], **images, return_tensors="pt")
    with prune_for_inference(
        model, config or trained, trained if config and config.isolator_tokens else None
    ) as handle:
        view = handle.prune_inputs(given)
        made = model.generate(**view, max_new_tokens=tokens, do_sample=False)
    return str(processor.tokenizer.decode(made[0, view["input_ids"].shape[1] :], skip_special_tokens=True))


GREEDY = {"max_new_tokens": 5, "until": ["\n\n"]}


def test_every_document_gets_the_answer_it_gets_alone(make: Make, trained: Path, small_run: Path) -> None:
    docs = documents(small_run, 1, 0, 2, 1, 1, 2)
    model = make()
    said = ask(model, docs, GREEDY)
    assert said == [answer_by_hand(trained, doc) for doc in docs]
    assert len(set(said)) > 1
    assert sorted(answer for _, _, answer in model.cache_hook.seen) == sorted(said)
    assert {name for name, _, _ in model.cache_hook.seen} == {"generate_until"}
    model.pruned.detach()
    assert ask(model, docs, GREEDY) != said


def test_documents_are_read_batch_by_batch(make: Make, small_run: Path) -> None:
    model = make()
    held: list[str] = []

    def reading(document: dict[str, Any]) -> list[dict[str, Any]]:
        held.append("read")
        return to_messages(document)

    stock = model.model.generate
    model.model.generate = lambda **given: (held.append("answer"), stock(**given))[1]
    ask(model, documents(small_run, 1, 1, 1, 1, 1), GREEDY, messages=reading)
    assert held == ["read", "read", "answer", "read", "read", "answer", "read", "answer"]


def test_settings_of_the_task_are_kept_apart(make: Make, trained: Path, small_run: Path) -> None:
    docs = documents(small_run, 1, 1, 1, 1)
    said = ask(make(), docs, {"max_new_tokens": 5}, {"max_new_tokens": 1})
    assert said == [answer_by_hand(trained, doc, tokens=1 if number % 2 else 5) for number, doc in enumerate(docs)]


def test_answers_end_where_the_task_says(make: Make, trained: Path, small_run: Path) -> None:
    docs = documents(small_run, 1)
    whole = answer_by_hand(trained, docs[0])
    stop = whole.split()[1]
    assert ask(make(), docs, {"max_new_tokens": 5, "until": [stop, ""]}) == [whole.partition(stop)[0]]
    assert ask(make(), docs, {"max_new_tokens": 5, "until": stop}) == [whole.partition(stop)[0]]
    assert ask(make(), docs, {"max_new_tokens": 5, "until": None}) == [whole]
    assert module._cut("one\n\ntwo END", ["\n\n", "END"]) == "one\n\ntwo "
    with pytest.raises(DataError, match="until must be a text or a list of texts, but 3 came"):
        module._cut("one", 3)  # type: ignore[arg-type]


def test_sampling_and_beams_are_passed_on(make: Make, small_run: Path) -> None:
    model = make()
    greedy = model._generation({"max_new_tokens": 7, "num_beams": 3, "temperature": 0, "top_p": None})
    assert (greedy.do_sample, greedy.num_beams, greedy.max_new_tokens) == (False, 3, 7)
    drawn = model._generation({"temperature": 0.5, "top_p": 0.9})
    assert (drawn.do_sample, drawn.temperature, drawn.top_p, drawn.max_new_tokens) == (True, 0.5, 0.9, 1024)
    assert len(ask(model, documents(small_run, 1), {"max_new_tokens": 3, "num_beams": 2})) == 1


def test_the_model_sees_the_runs_share_of_tokens_or_another(make: Make, trained: Path, small_run: Path) -> None:
    doc = documents(small_run, 1)[0]
    for arguments, share in (("", 0.25), ("keep_ratio=0.5", 0.5)):
        model = make(arguments)
        given = model.processor(text=["<image> hello"], images=[doc["images"]], return_tensors="pt")
        kept = model.pruned.prune_inputs(given)["mm_encoder_outputs"]["image"].pooler_output[0]
        assert kept.shape[0] == int(TOKENS * share) + 2  # the isolator's rows
        assert model.pruned.isolator is not None
    config = DualSpeedConfig(keep_ratio=0.5, isolator_tokens=2)
    assert ask(make("keep_ratio=0.5"), [doc], GREEDY) == [answer_by_hand(trained, doc, config)]


def test_a_model_without_a_run_needs_a_ratio(make: Make, small_run: Path, trained: Path) -> None:
    bare = small_run / "model"
    with pytest.raises(SettingError, match=r"needs dualspeed=DIRECTORY of the run, or keep_ratio"):
        module.TrimtabPruned(pretrained=str(bare), device="cpu")
    model = module.TrimtabPruned(pretrained=str(bare), keep_ratio=0.5, pruner="random", device="cpu")
    assert model.pruned.isolator is None
    assert (model.pruned.config.keep_ratio, model.pruned.config.pruner) == (0.5, "random")
    from_run = module.TrimtabPruned(pretrained=str(bare), dualspeed=str(trained), device="cpu")
    assert from_run.pruned.isolator is not None


def test_a_system_prompt_stands_in_front(make: Make, small_run: Path, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("red is left\n")
    for system in ("red is left", str(tmp_path / "system.txt")):
        model = make(system_prompt=system)
        seen: list[Any] = []
        stock = model.processor.apply_chat_template
        model.processor.apply_chat_template = lambda chat, **more: (seen.append(chat), stock(chat[1:], **more))[1]  # noqa: B023
        ask(model, documents(small_run, 1), GREEDY)
        assert seen[0][0] == {"role": "system", "content": [{"type": "text", "text": "red is left"}]}


def test_what_is_not_answered_says_so(make: Make, small_run: Path) -> None:
    model = make()
    with pytest.raises(NotImplementedError, match="no loglikelihood"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one round only"):
        model.generate_until_multi_round([])
    film = [{"role": "user", "content": [{"type": "video", "url": "film.mp4"}]}]
    with pytest.raises(UnsupportedModelError, match="Document 0 of the task 'scenes' holds video or audio"):
        ask(model, documents(small_run, 1), GREEDY, messages=lambda doc: film)


def test_wrong_arguments_are_named(make: Make) -> None:
    with pytest.raises(SettingError, match=r"no model_args 'keep_ration'.*Did you mean 'keep_ratio'"):
        make("keep_ration=0.5")
    with pytest.raises(SettingError, match="batch_size must be a whole number, at least 1, but 'auto' came"):
        make(batch_size="auto")


def test_cleaning_takes_the_pruning_off(make: Make) -> None:
    model = make(max_batch_size=4)
    inner = model.model
    assert "generate" in vars(inner)
    model.clean()
    assert "generate" not in vars(inner)
    assert not hasattr(model, "model")
    assert not hasattr(model, "pruned")


def test_the_entry_point_leads_to_the_class(lmms_eval: None) -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    place, _, function = groups["lmms_eval.models"]["trimtab"].partition(":")
    manifest = getattr(importlib.import_module(place), function)()
    assert (manifest.model_id, manifest.simple_class_path) == ("trimtab_pruned", None)
    holder, _, name = manifest.chat_class_path.rpartition(".")
    found = getattr(importlib.import_module(holder), name)
    assert issubclass(found, Lmms)
    assert found.is_simple is False
    assert found is getattr(module, name)


def test_without_lmms_eval_the_module_loads_and_the_class_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    module._model_class.cache_clear()
    with pytest.raises(MissingExtraError, match="pip install lmms-eval"):
        module.TrimtabPruned  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        module.Other  # noqa: B018
