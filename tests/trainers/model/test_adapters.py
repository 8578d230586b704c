"""One base, one LoRA per policy: identity, isolation, the requires_grad table, files."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from marlora.agents.types import AdapterSpec, PolicySpec, SettingError
from marlora.rollouts.files import adapter_sha256
from marlora.trainers.model.adapter_files import WEIGHTS, base_sha256
from marlora.trainers.model.adapters import Adapters, active_adapters, linear_names
from tests.trainers.random_models import disturb, random_model

SMALL = AdapterSpec(r=2, alpha=4.0, targets=("q_proj", "v_proj"))
WIDE = AdapterSpec(r=4, alpha=4.0, targets=("q_proj", "o_proj", "down_proj"))
IDS = torch.tensor([[3, 5, 7, 9, 11]])


def policies() -> list[PolicySpec]:
    return [
        PolicySpec("a", adapter=SMALL),
        PolicySpec("b", adapter=WIDE),
        PolicySpec("c", adapter=SMALL, trainable=False),
        PolicySpec("base"),
        PolicySpec("outside", url="http://localhost:1/v1"),
    ]


def make(seed: int = 0, **settings) -> Adapters:
    return Adapters(random_model(**settings), policies(), seed=seed, base_name="tiny")


def loss(model) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(
        model(input_ids=IDS, use_cache=False).logits[0, :-1], IDS[0, 1:]
    )


def table(adapters: Adapters) -> set[str]:
    """Names of the adapters all of whose parameters require a gradient; the base as `base`."""
    on = {
        name
        for name in adapters.policies
        if all(p.requires_grad for p in adapters.parameters(name).values())
    }
    partly = {
        name
        for name in adapters.policies
        if any(p.requires_grad for p in adapters.parameters(name).values())
    }
    assert on == partly
    return on | {
        "base"
        for n, p in adapters.model.named_parameters()
        if ".lora_" not in n and p.requires_grad
    }


def test_only_policies_with_weights_of_their_own_get_an_adapter():
    adapters = make()
    assert sorted(adapters.policies) == ["a", "b", "c"]
    assert adapters.trainable == ("a", "b")
    assert (
        len(adapters.parameters("a")) == 2 * 2 * 2 and len(adapters.parameters("b")) == 2 * 2 * 3
    )  # layers x sides x targets
    assert list(adapters.parameters("a")) == sorted(adapters.parameters("a"))
    assert not any(".b." in key or ".c." in key for key in adapters.parameters("a"))


def test_init_does_not_depend_on_the_order_of_creation_nor_on_the_global_generator():
    first = make()
    torch.manual_seed(77)
    state = torch.get_rng_state()
    second = Adapters(random_model(), policies()[::-1], seed=0)
    torch.manual_seed(77)
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: first.sha256(n) for n in "abc"} == {n: second.sha256(n) for n in "abc"}
    assert first.sha256("a") != make(seed=1).sha256("a")
    a, c = first.parameters("a"), first.parameters("c")
    assert all(not torch.equal(a[k], c[k]) for k in a if ".lora_A." in k)


def test_a_fresh_adapter_equals_the_base_and_base_means_adapters_off():
    adapters, plain = make(), random_model()
    with torch.no_grad():
        expected = plain(input_ids=IDS).logits
        with adapters.active("a") as model:
            assert torch.equal(model(input_ids=IDS).logits, expected)
        disturb(adapters)
        with adapters.active("a") as model:
            assert active_adapters(model) == ("a",)
            spoken = model(input_ids=IDS).logits
            with adapters.active("base"):
                assert active_adapters(model) == ()
                assert torch.equal(model(input_ids=IDS).logits, expected)
            with adapters.active("b"):
                assert not torch.equal(model(input_ids=IDS).logits, spoken)
            assert torch.equal(model(input_ids=IDS).logits, spoken)  # nesting ends where it began
        assert not torch.equal(spoken, expected)


def test_adapters_are_float32_on_a_bfloat16_base():
    adapters = Adapters(random_model().to(torch.bfloat16), policies(), seed=0)
    assert {p.dtype for n in "abc" for p in adapters.parameters(n).values()} == {torch.float32}
    assert {p.dtype for n, p in adapters.model.named_parameters() if ".lora_" not in n} == {
        torch.bfloat16
    }
    assert adapters.sha256("a") == make().sha256("a")


def test_requires_grad_is_the_table_after_every_call(tmp_path):
    adapters = make()
    expected = {"a", "b"}
    assert table(adapters) == expected
    for name in ("a", "b", "c", "base"):
        with adapters.active(name):
            assert table(adapters) == expected
        assert table(adapters) == expected
    adapters.load("b", adapters.save("b", tmp_path / "b"))
    assert table(adapters) == expected
    model = adapters.model  # PEFT called by somebody else: the next use sets the table right
    for call in (
        lambda: model.set_adapter("c"),
        lambda: model.disable_adapter().__enter__(),
        lambda: model.add_adapter("stray", LoraConfig(r=2, target_modules=["q_proj"])),
        lambda: model.load_adapter(str(tmp_path / "b"), "loaded", is_trainable=True),
        lambda: model.requires_grad_(True),
    ):
        call()
        with adapters.active("a"):
            adapters.check()
            assert table(adapters) == expected
    model.set_adapter("c")
    with pytest.raises(RuntimeError, match="requires_grad of"):
        adapters.check()


def test_a_tensor_that_was_replaced_is_seen_and_taken_after_refresh():
    """Optimizers keep the tensors that `parameters` gave them."""
    adapters = make()
    layer = next(layer for layer in adapters.model.modules() if isinstance(layer, LoraLayer))
    old = layer.lora_A["a"].weight
    layer.lora_A["a"].weight = torch.nn.Parameter(old.detach().clone())
    assert any(p is old for p in adapters.parameters("a").values())
    with pytest.raises(RuntimeError, match="they were replaced"):
        adapters.check()
    adapters.refresh()
    adapters.check()
    assert any(p is layer.lora_A["a"].weight for p in adapters.parameters("a").values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_move_their_own_adapter_only_and_never_the_base(checkpointing, tmp_path):
    adapters = make()
    before_base = adapters.base_sha256()
    assert before_base == base_sha256(random_model())
    if checkpointing:
        adapters.checkpoint_activations()
    adapters.model.train()
    optimizers = {
        n: torch.optim.AdamW(list(adapters.parameters(n).values()), lr=1e-2, weight_decay=0.0)
        for n in adapters.trainable
    }
    hashes = {n: adapters.sha256(n) for n in "abc"}
    for step, name in enumerate(["a", "b", "b", "a", "b"]):
        with adapters.active(name) as model:
            loss(model).backward()
        grads = {n: [p.grad for p in adapters.parameters(n).values()] for n in "abc"}
        assert all(g is not None and torch.isfinite(g).all() for g in grads[name])
        assert all(
            p.grad.abs().sum() > 0
            for key, p in adapters.parameters(name).items()
            if ".lora_B." in key
        )
        assert all(g is None for other in "abc" if other != name for g in grads[other])
        moments = {
            n: [s["exp_avg"].clone() for s in o.state.values()]
            for n, o in optimizers.items()
            if n != name
        }
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)
        for other, old in moments.items():
            assert all(
                torch.equal(s["exp_avg"], m)
                for s, m in zip(optimizers[other].state.values(), old, strict=True)
            )
        now = {n: adapters.sha256(n) for n in "abc"}
        assert [n for n in "abc" if now[n] != hashes[n]] == [name], step
        hashes = now
        if step == 2:
            adapters.load("c", adapters.save("c", tmp_path / "c"))
    assert adapters.base_sha256() == before_base
    assert {id(p) for o in optimizers.values() for g in o.param_groups for p in g["params"]} == {
        id(p) for n in adapters.trainable for p in adapters.parameters(n).values()
    }


def test_checkpointing_computes_every_layer_again_in_backward():
    adapters = make()
    adapters.checkpoint_activations()
    layers = [m for m in adapters.model.modules() if type(m).__name__.endswith("DecoderLayer")]
    calls = []
    hooks = [m.self_attn.register_forward_hook(lambda *_: calls.append(1)) for m in layers]
    with adapters.active("a") as model:
        value = loss(model)
        assert len(calls) == len(layers) > 0
        value.backward()
    assert len(calls) == 2 * len(layers)
    for hook in hooks:
        hook.remove()


def test_saved_folders_are_plain_peft_and_come_back_bit_for_bit(tmp_path):
    adapters = make()
    disturb(adapters)
    folder = adapters.save("b", tmp_path / "adapters" / "b")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (
        config["peft_type"] == "LORA"
        and config["base_model_name_or_path"] == "tiny"
        and config["inference_mode"] is True
    )
    assert (
        config["target_modules"] == ["down_proj", "o_proj", "q_proj"]
        and config["lora_alpha"] == 4
        and config["r"] == 4
    )
    assert (
        json.loads((adapters.save("a", tmp_path / "a") / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        == "tiny"
    )
    assert adapter_sha256(folder / WEIGHTS) == adapters.sha256("b")
    with torch.no_grad(), adapters.active("b") as model:
        expected = model(input_ids=IDS).logits
    alone = PeftModel.from_pretrained(random_model(), folder)
    assert torch.equal(alone(input_ids=IDS).logits, expected)
    fresh = Adapters(random_model(), [PolicySpec("other", adapter=WIDE, init=str(folder))], seed=5)
    assert fresh.sha256("other") == adapters.sha256("b")
    again = Adapters(
        random_model(), [PolicySpec("other", adapter=WIDE, init=f"{tmp_path}#b")], seed=5
    )
    assert again.sha256("other") == adapters.sha256("b")
    first = (folder / "adapter_config.json").read_bytes()
    assert (adapters.save("b", tmp_path / "again") / "adapter_config.json").read_bytes() == first


def test_a_folder_written_by_peft_loads(tmp_path):
    wrapped = make()
    disturb(wrapped)
    wrapped.model.save_pretrained(tmp_path, selected_adapters=["a"])
    fresh = Adapters(
        random_model(),
        [PolicySpec("x", adapter=SMALL, init=str(tmp_path / "a"))],
        seed=0,
        base_name="tiny",
    )
    assert fresh.sha256("x") == wrapped.sha256("a")


def test_bad_folders_are_refused_and_change_nothing(tmp_path):
    adapters = make()
    good = adapters.save("a", tmp_path / "good")

    def spoiled(name: str, change=None, **config) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        old = json.loads((good / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(old | config))
        tensors = load_file(good / "adapter_model.safetensors")
        save_file(change(tensors) if change else tensors, folder / "adapter_model.safetensors")
        return folder

    first = next(iter(adapters.parameters("a")))
    cases = [
        (tmp_path / "none", "no adapter_config.json"),
        (spoiled("rank", r=3), "r is 3, the policy says 2"),
        (spoiled("alpha", lora_alpha=9), "lora_alpha is 9"),
        (spoiled("dora", use_dora=True), "use_dora"),
        (spoiled("kind", peft_type="IA3"), "IA3"),
        (spoiled("base", base_model_name_or_path="other-model"), "made for base 'other-model'"),
        (
            spoiled("missing", lambda t: {k: v for k, v in t.items() if k != first}),
            "differ in name",
        ),
        (spoiled("shape", lambda t: t | {first: torch.zeros(3, 3)}), "has shape"),
        (spoiled("nan", lambda t: t | {first: t[first] * float("nan")}), "not finite"),
    ]
    (spoiled("torn") / "adapter_model.safetensors").write_bytes(
        (good / "adapter_model.safetensors").read_bytes()[:100]
    )
    cases.append((tmp_path / "torn", "cannot be read"))
    before = adapters.sha256("a")
    for folder, message in cases:
        with pytest.raises(SettingError, match=message):
            adapters.load("a", folder)
        assert adapters.sha256("a") == before
    stranger = Adapters(random_model(seed=3), policies(), seed=0, base_name="tiny")
    with pytest.raises(SettingError, match="whose weights differ"):
        stranger.load("a", good)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            PolicySpec("a", adapter=AdapterSpec(targets=("q_proj", "query"))),
            r"'query' is not a linear layer.*down_proj.*q_proj",
        ),
        (
            PolicySpec("a", adapter=AdapterSpec(targets=("embed_tokens",))),
            "'embed_tokens' is not a linear layer",
        ),
        (PolicySpec("a", init="nowhere"), "policy 'a': adapter in nowhere: no adapter_config.json"),
        (PolicySpec("a.b"), "policy name 'a.b'"),
        (PolicySpec("values"), "policy name 'values': torch uses this word"),
    ],
)
def test_settings_that_cannot_be_used_say_why(policy, message):
    with pytest.raises(SettingError, match=message):
        Adapters(random_model(), [policy], seed=0)


def test_unknown_names_are_errors_never_the_base():
    adapters = make()
    with pytest.raises(SettingError, match="policy 'A' has no adapter here"), adapters.active("A"):
        pass
    with pytest.raises(SettingError, match="outside"):
        adapters.parameters("outside")
    with pytest.raises(SettingError, match="two policies"):
        Adapters(random_model(), [PolicySpec("a"), PolicySpec("a")], seed=0)


def test_all_linear_and_a_run_without_adapters():
    assert linear_names(random_model()) == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    adapters = Adapters(
        random_model(), [PolicySpec("a", adapter=AdapterSpec(targets=("all-linear",)))], seed=0
    )
    assert len(adapters.parameters("a")) == 2 * 2 * 7
    assert linear_names(adapters.model) == linear_names(random_model())
    none = Adapters(random_model(), [PolicySpec("base")], seed=0)
    with none.active("base") as model:
        assert model(input_ids=IDS).logits.shape == (1, 5, 41)
    assert none.trainable == () and none.base_sha256() == adapters.base_sha256()


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_fine(tied):
    adapters = make(tie_word_embeddings=tied)
    before = adapters.base_sha256()
    with adapters.active("a") as model:
        loss(model).backward()
    torch.optim.SGD(list(adapters.parameters("a").values()), lr=1.0).step()
    assert adapters.base_sha256() == before == base_sha256(random_model(tie_word_embeddings=tied))
