"""The plan of a stage: textbook volumes, DeepSpeed's own estimates, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from hive_ds.cli import main
from hive_ds.planning.communication import ZeroPolicy
from hive_ds.planning.hardware import GPUS, LINK_LATENCY, NETWORKS
from hive_ds.planning.messages import ALL_GATHER, ALL_REDUCE, Message, bytes_sent
from hive_ds.planning.plan import ProfilePlan, best_of, count_samples, plan_profile, plan_profiles, scaling, steps_of
from hive_ds.planning.report import PlanReport, merged
from hive_ds.planning.stage_model import StageModel
from hive_ds.planning.timing import Assumptions, Cluster, communication_time
from hive_ds.planning.trace import FETCH
from hive_ds.recipe import load_recipe
from hive_ds.training.ds_config import read_policy

RECIPE = "hive-siglip-l-mobilellm-600m"
RANKS = 16


@pytest.fixture(scope="module")
def model() -> StageModel:
    """Stage 3 of the paper's recipe."""
    return StageModel.of(load_recipe(RECIPE), 3, text_length=128)


def _sent(model: StageModel, policy: dict, micro_batches: int = 1) -> dict[str, float]:
    messages = model.messages(ZeroPolicy.of(policy, RANKS, 8), RANKS, micro_batches)
    return {name: bytes_sent(getattr(messages, name)) for name in ("gathers", "renewals", "gradients")}


def _share(elements: int) -> float:
    return 2 * elements * (RANKS - 1) / RANKS


@pytest.mark.parametrize(("profile", "rounds", "renews"), [("zero0", 2, 0), ("zero1", 2, 1), ("zero2", 2, 1)])
def test_volumes_below_zero3(profile: str, rounds: int, renews: int, model: StageModel) -> None:
    sent = _sent(model, read_policy(profile))
    assert sent["gathers"] == 0
    assert sent["gradients"] == pytest.approx(rounds * _share(model.trained))
    assert sent["renewals"] == pytest.approx(renews * _share(model.trained), rel=1e-6)


def test_zero2_reduces_every_micro_batch_and_zero1_the_step(model: StageModel) -> None:
    for profile, times in (("zero0", 1), ("zero1", 1), ("zero2", 4), ("zero3", 4)):
        once, four = (_sent(model, read_policy(profile), count)["gradients"] for count in (1, 4))
        assert four == times * once


def test_zero3_gathers_a_model_never_about_once_or_at_every_visit(model: StageModel) -> None:
    """By how much of it may stay."""
    policy = read_policy("zero3")
    sent = _sent(model, policy)
    assert sent["gathers"] == 0
    assert sent["renewals"] == pytest.approx(_share(model.trained), rel=1e-4)
    policy["zero_optimization"]["stage3_max_reuse_distance"] = model.parameters - 1
    kept = _sent(model, policy)["gathers"]
    used = {name for event in model.trace.events if event.kind == FETCH for name in model.layout.owned[event.module]}
    large = [model.layout.sizes[name] for name in used if model.layout.sizes[name] > 10_000]
    assert 1 <= kept / _share(sum(large)) < 1.05  # some first weights lie beyond the reuse distance
    zero = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
    forgetful = _sent(model, {"zero_optimization": {**policy["zero_optimization"], **zero}})["gathers"]
    assert 1.5 * kept < forgetful < 3.5 * kept


@pytest.mark.parametrize("profile", ["zero2", "zero3"])
def test_model_states_are_deepspeeds_own_estimate(profile: str, model: StageModel) -> None:
    states = model.states(read_policy(profile), RANKS, 1)
    if profile == "zero2":  # it counts a 16-bit copy of the gradients' part, which DeepSpeed 0.19.8 does not keep
        _, estimate = estimate_zero2_model_states_mem_needs(model.trained, 8, 2, cpu_offload=False)
        expected = estimate - 2 * model.trained / RANKS + 2 * (model.parameters - model.trained)
    else:
        _, estimate, largest = estimate_zero3_model_states_mem_needs(
            model.trained, 1000, 8, 2, cpu_offload=False, cpu_offload_params=False
        )
        expected = estimate - largest + 2 * (model.parameters - model.trained) / RANKS
    small = sum(size for size in model.layout.sizes.values() if size <= 10_000)
    padding = 18 * len(model.layout.sizes)
    assert expected <= states.device + 18 <= expected + 18 + padding + (2 * small if profile == "zero3" else 0)


def test_time_of_a_message() -> None:
    cluster = Cluster(2, 8, GPUS["h200"], NETWORKS["ib200x8"])
    assumed = Assumptions(bandwidth_share=0.5)
    gather = Message(ALL_GATHER, 16 * 10**9, 16)
    latency = 14 * LINK_LATENCY + 2 * NETWORKS["ib200x8"].latency
    assert communication_time([gather], cluster, assumed) == pytest.approx(15e9 / 100e9 + latency)
    inside = Message(ALL_GATHER, 8 * 10**9, 8)
    assert communication_time([inside], cluster, assumed) == pytest.approx(7e9 / 225e9 + 7 * LINK_LATENCY)
    number = Message(ALL_REDUCE, 8, 16)
    tree = 2 * (7 * LINK_LATENCY + NETWORKS["ib200x8"].latency)
    assert communication_time([number], cluster, assumed) == pytest.approx(tree, rel=1e-3)
    assert communication_time([Message(ALL_REDUCE, 10**9, 1)], cluster, assumed) == 0


def test_memory_decides(model: StageModel) -> None:
    def planned(memory: float) -> list[ProfilePlan]:
        cluster = Cluster(1, 8, replace(GPUS["h200"], memory=memory), NETWORKS["ib400"])
        return plan_profiles(model, cluster, Assumptions())

    plans = {"roomy": planned(141e9), "tight": planned(4e9)}
    best = best_of(plans["roomy"])
    assert best is not None
    assert best.micro_batch == model.config.micro_batch_size
    for plan in plans["roomy"] + plans["tight"]:
        assert plan.micro_batch * plan.accumulation * 8 == model.config.global_batch_size
    smaller = best_of(plans["tight"])
    assert smaller is None or (smaller.micro_batch < best.micro_batch and smaller.peak <= 3.6e9)
    assert best_of(planned(1e8)) is None


def test_auto_is_the_largest_that_is_predicted_to_fit(model: StageModel) -> None:
    auto = replace(model, config=replace(model.config, micro_batch_size="auto"))
    cluster, assumed = Cluster(1, 8, GPUS["h200"], NETWORKS["ib400"]), Assumptions()
    share = model.config.global_batch_size // 8
    roomy = plan_profile(auto, "zero3", cluster, assumed)
    assert roomy.micro_batch == share > model.config.micro_batch
    tight = replace(cluster, gpu=replace(cluster.gpu, memory=0.7 * roomy.peak / assumed.usable_memory))
    found = plan_profile(auto, "zero3", tight, assumed)
    assert found.fits
    assert found.micro_batch < share
    larger = min(size for size in range(found.micro_batch + 1, share + 1) if share % size == 0)
    bounded = replace(model, config=replace(model.config, micro_batch_size=larger))
    assert plan_profile(bounded, "zero3", tight, assumed).micro_batch == found.micro_batch
    lines = PlanReport("test", auto, 64, tight, "h200", "ib400", assumed, [found], None).lines()
    assert any("micro_batch_size is auto: batches are the largest predicted to fit" in line for line in lines)


def test_scaling_from_1_to_1024(model: StageModel) -> None:
    cluster, assumed = Cluster(2, 8, GPUS["h200"], NETWORKS["ib400x8"]), Assumptions()
    curves = scaling(model, cluster, assumed)
    assert [plan.ranks for plan in curves["zero2"]] == [2**power for power in range(11)]
    assert [plan.ranks for plan in curves["zero3_hpz"]] == [2**power for power in range(4, 11)]
    # hpZ changes nothing of a model that ZeRO-3 keeps whole.
    assert "zero3, zero3_hpz" in merged(curves)
    slower = [replace(plan, time=replace(plan.time, total=1.1 * plan.time.total)) for plan in curves["zero3_hpz"]]
    assert {"zero3", "zero3_hpz"} <= set(merged({**curves, "zero3_hpz": slower}))
    one = curves["zero2"][0]
    assert one.sent == 0
    for plan in curves["zero2"]:
        assert plan.samples_per_second <= plan.ranks * one.samples_per_second * (1 + 1e-9)
        assert plan.time.compute == pytest.approx(one.time.compute / plan.ranks)
    slow = plan_profile(model, "zero3", replace(cluster, network=NETWORKS["eth25"]), assumed)
    fast = plan_profile(model, "zero3", cluster, assumed)
    assert slow.time.total > fast.time.total
    assert slow.sent == fast.sent


def test_steps_and_samples(model: StageModel, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"shards": [{"samples": 3}, {"samples": 4}]}))
    assert count_samples(str(tmp_path)) == 7
    assert count_samples({str(tmp_path): 1.0, str(tmp_path / "none"): 1.0}) is None
    assert steps_of(model, None) is None
    assert steps_of(model, 3 * model.config.global_batch_size) == 3
    assert steps_of(model, 3 * model.config.global_batch_size + 1) == 4  # the loader fills up the last batch


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "scaling.png"
    arguments = ["plan", RECIPE, "--stage", "1", "--nodes", "2", "--gpu", "A100", "--samples", "2950000"]
    assert main([*arguments, "--json", str(out), "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    for word in ("read from", "assumed:", "predicted, not measured", "take: --set training.ds_config=", "steps in"):
        assert word in printed
    plan = json.loads(out.read_text())
    assert plan["assumed"]["gpu"]["name"] == "a100"
    assert plan["predicted"]["steps"] == round(0.2 * 2950000 / 256)
    assert plan["predicted"]["best"] in {row["profile"] for row in plan["predicted"]["profiles"] if row["fits"]}
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "v100"), "gpu 'v100': expected one of b200, "),
        (("--network", "token-ring"), "network 'token-ring': expected one of ib400x8, "),
        (("--nodes", "3"), "global_batch_size 1024 is not divisible by 24 ranks"),
        (("--nodes", "0"), "--nodes 0: expected a number of at least 1"),
        (("--efficiency", "1.5"), "--efficiency 1.5: expected a share"),
        (("--stage", "9"), "stage 9: expected one of"),
    ],
)
def test_wrong_input(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", RECIPE, *arguments]) == 2
    assert message in capsys.readouterr().err
