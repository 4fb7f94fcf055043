"""The scorer's deployment without Serve, over a real model; and the private interface of Serve."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from tests.helpers.models import CONVERSATIONS, change_contract, make_export

from rayward.config.placement import Placement
from rayward.config.scoring import ReplicaConfig
from rayward.contract.conversation import Message
from rayward.errors import ContractMismatchError, ServerError
from rayward.scoring.load import load_scored_model
from rayward.serving.calls import QUEUED_TOKENS, TOKENS_PER_S, ScoreCall, ScoredCall
from rayward.serving.engine.work import TEXT_CHARS, count_chars
from rayward.wire.items import Asked, ScoreItem

# Ray Serve 2.60 is imported inside the tests: its own models warn about deprecated pydantic settings.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CONFIG = ReplicaConfig(device="cpu", tokens_per_batch=512)
ITEMS = (
    *(ScoreItem(prompt, (text, f"{text} Really.")) for prompt, text in CONVERSATIONS),
    ScoreItem(({"role": "user", "content": "word " * 400},), ("Too much.",)),
    ScoreItem(({"role": "user", "content": "Hello"},), ("Hi",), Asked(weights="unknown")),
)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def _switch_interval() -> Iterator[None]:
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


async def deployed(source: Path, config: ReplicaConfig = CONFIG) -> Any:
    from rayward.serving.replica import ScorerDeployment

    return cast(Any, ScorerDeployment).func_or_class(str(source), config, "tiny")


@pytest.mark.usefixtures("_switch_interval")
def test_a_replica_scores_as_the_scorer_does(export: Path) -> None:
    async def scenario() -> tuple[list[ScoredCall], Any]:
        replica = await deployed(export)
        calls = [ScoreCall(ITEMS[index:] + ITEMS[:index], request_id=str(index), caller=str(index % 2)) for index in range(len(ITEMS))]
        scored = await asyncio.gather(*map(replica.score, calls))
        replica.check_health()
        return list(scored), replica

    scored, replica = asyncio.run(scenario())
    scorer = load_scored_model(export, Placement(device="cpu", tokens_per_batch=512))
    expected = scorer.score(ITEMS)
    for index, each in enumerate(scored):
        assert each.version == scorer.version
        for found, wanted in zip(each.results, expected[index:] + expected[:index], strict=True):
            assert found.error == wanted.error
            assert (found.rewards is None) == (wanted.rewards is None)
            assert found.rewards == pytest.approx(wanted.rewards, abs=1e-5)
            assert found.tokens == wanted.tokens
    info = asyncio.run(replica.info())
    assert (info.id, info.version, info.max_tokens) == ("tiny", scorer.version, scorer.facts.max_tokens)
    assert set(replica.record_autoscaling_stats()) == {QUEUED_TOKENS, TOKENS_PER_S}
    assert asyncio.run(replica.stats()).counters[("completions_total", ())] == 2 * 3 * len(ITEMS)
    pids = replica._engine._encoders.pids
    assert pids
    replica.__del__()
    assert replica._engine._encoders.pids == set()


def test_a_tampered_model_never_becomes_a_replica(tmp_path: Path) -> None:
    tampered = make_export(tmp_path / "tampered", golden_shift=1.0)
    with pytest.raises(ContractMismatchError) as caught:
        asyncio.run(deployed(tampered))
    assert caught.value.__notes__


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    escaping = make_export(tmp_path / "escaping")
    template = (
        "{% for m in messages %}{% if 'escape' in m['content'] %}"
        "{{ messages.__class__.__mro__[1].__subclasses__()|length }}{{ cycler.__init__.__globals__.os.getpid() }}"
        "{% endif %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    )
    change_contract(escaping, template=template, golden=())

    async def scenario() -> ScoredCall:
        replica = await deployed(escaping, CONFIG.model_copy(update={"verify_golden": False}))
        try:
            items = tuple(ScoreItem(({"role": "user", "content": text},), ("yes",)) for text in ("please escape", "stay"))
            scored: ScoredCall = await replica.score(ScoreCall(items, request_id="r"))
            return scored
        finally:
            replica.__del__()

    escaped, stayed = asyncio.run(scenario()).results
    assert escaped.error is not None
    assert escaped.error.code == "template"
    assert stayed.rewards is not None


def test_the_size_of_an_item_is_that_of_all_its_texts() -> None:
    called: Message = {
        "role": "assistant", "content": "c" * 10, "reasoning_content": "r" * 20,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": ["x" * 500]}}}],
    }  # fmt: skip
    prompt: tuple[Message, ...] = ({"role": "user", "content": "p" * 7},)
    assert count_chars(ScoreItem(prompt, ("a" * 30, "b" * 3))) == 40 + 3 * TEXT_CHARS
    rich = count_chars(ScoreItem(prompt, ((called,),), tools=({"name": "t" * 1000},), chat_template_kwargs={"k": "v" * 100}))
    assert 7 + 10 + 20 + 500 + 1000 + 100 < rich < 1637 + 100 + 20 * TEXT_CHARS


def test_serve_still_has_the_private_interface_that_we_use() -> None:
    import ray
    from ray.serve import context
    from ray.serve._private.client import ServeControllerClient

    why = f"Ray {ray.__version__} no longer has it: see rayward/serving/proxies.py"
    assert "raise_if_no_controller_running" in inspect.signature(context._get_global_client).parameters, why
    assert isinstance(inspect.getattr_static(ServeControllerClient, "http_config", None), property), why


def test_another_serve_says_what_it_has_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.serve.context

    from rayward.serving.proxies import running_address

    monkeypatch.setattr(ray.serve.context, "_get_global_client", lambda **_: None)
    assert running_address() is None
    monkeypatch.delattr(ray.serve.context, "_get_global_client")
    with pytest.raises(ServerError, match=r"no longer has ray\.serve\.context\._get_global_client"):
        running_address()
