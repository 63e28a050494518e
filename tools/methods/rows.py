"""The methods that are compared: each row makes the policy of a case."""

from functools import partial
from typing import Any

from methods.cases import Case, Row, block_linears, with_blocks

from dit2deploy.artefacts.policy import MonarchGrid, Policy
from dit2deploy.evaluate.size import effective_weight_bits
from dit2deploy.models.load import open_model
from dit2deploy.quantizers.permutation import choose_rotation
from dit2deploy.stages.finetune import Settings
from dit2deploy.stages.quantize.time_widths import search_time_widths
from dit2deploy.stages.quantize.tune import search_group_sizes, search_monarch, search_smoothing
from dit2deploy.stages.search import search

TIME_GROUPS = 3
EXTRA_BITS = 0.25  # a weight, for scales of groups: what `search_group_sizes` may spend


def uniform(case: Case, **overrides: Any) -> Policy:
    return case.uniform(**overrides)


def smooth(case: Case, alpha: float | None, **overrides: Any) -> Policy:
    """SmoothQuant where it can be folded (not before the second linear of the MLP); alpha None: searched."""
    policy = case.uniform(**overrides)
    if alpha is None:
        return search_smoothing(case.model, policy, case.calibration, seed=case.seed)
    layers = {
        name: layer.model_copy(update={"smoothing": alpha}) if name.endswith(SMOOTHED) else layer
        for name, layer in policy.layers.items()
    }
    return policy.model_copy(update={"layers": layers})


SMOOTHED = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj")


def smooth_branch(case: Case) -> Policy:
    return smooth(case, None, rounding="gptq", low_rank=case.rank, group_size=64)


def grouped(case: Case) -> Policy:
    return search_group_sizes(case.model, case.uniform(rounding="gptq"), case.calibration, seed=case.seed)


def tq_dit(case: Case, *, groups: int, attention: bool = True, regions: bool = True) -> Policy:
    """TQ-DiT at the column's bits; without `attention` its products stay in float, without `regions` GELU has tokens'
    steps."""
    bits = case.column.activation_bits
    recipe = "tq-dit" if bits == 8 else "tq-dit-w6a6"
    policy = search(case.model, case.folder / "policy.json", recipe=recipe, seed=case.seed, groups=groups)
    if not regions:
        policy = with_blocks(case, policy, regions="token")
    return policy if attention else policy.model_copy(update={"attentions": {}})


def evolved(case: Case) -> Policy:
    """Group sizes of weights below 8 bits by evolution, at the quarter bit that Q-DiT-like spends."""
    plain = case.uniform(rounding="gptq")
    if case.column.recipe == "w8a8":
        return plain
    return search(
        case.model,
        case.folder / "q-dit.json",
        recipe="q-dit",
        calibration=case.calibration,
        base=case.column.recipe,
        activation_bits=case.column.activation_bits,
        budget=effective_weight_bits(plain, block_linears(case.model)) + EXTRA_BITS,
        seed=case.seed,
        trajectories=max(2, len(case.calibration.manifest.seeds) // 2),
        **{"hadamard": 1, "low_rank": 0, "rounding": "gptq", "clip": "absmax", "grid": "mid-tread"},
    )


def twin_log(case: Case) -> Policy:
    """Twin-Log weights, as int8 codes, where the column has 3 or 4 bits; zigzag where outliers are salient."""
    policy = choose_rotation(case.model, case.uniform(hadamard=None), case.calibration)
    bits = {"w4a4": 4, "w3a3": 3}.get(case.column.recipe)
    return with_blocks(case, policy, weight="int8", log_bits=bits) if bits else policy


def salient(case: Case) -> Policy:
    return with_blocks(case, case.uniform(low_rank=case.rank), branch_init="salient")


def lsg(case: Case) -> Policy:
    return smooth(case, 1.0, hadamard=None, low_rank=case.rank)


def timed(case: Case) -> Policy:
    policy = case.uniform(hadamard=None)
    average, groups = case.column.activation_bits, min(TIME_GROUPS, len(case.calibration))
    return search_time_widths(case.model, policy, case.calibration, average=average, groups=groups, seed=case.seed)


def branch(case: Case, **changes: Any) -> Policy:
    """Hadamard, gaussian clip and a low-rank branch: RobuQ's layer."""
    chosen = {"clip": "gaussian", "grid": None, "rounding": "gptq", "modulation": None, **changes}
    of_recipe = {name: chosen.pop(name) for name in ("clip", "grid", "rounding", "modulation")}
    return with_blocks(case, case.uniform(hadamard=None, low_rank=case.rank, **of_recipe), **chosen)


def robuq(case: Case) -> Policy:
    """What of RobuQ needs no training; its grid is mid-rise where that gains most (methods.md 3.4) [inferred]."""
    grid = "mid-rise" if case.column.activation_bits <= 2 else "mid-tread"
    return branch(case, rounding="nearest", branch_init="weight", grid=grid)


def reconstructed(case: Case, **changes: Any) -> Policy:
    """PTQ4DiT: salience balanced over the steps where it folds, then AdaRound, block by block."""
    return with_blocks(case, smooth(case, 0.5), rounding="adaround", smoothing_steps="correlation", **changes)


def temporal(case: Case) -> Policy:
    """TFMQ-DM: AdaRound by blocks, and on all timesteps and classes where a layer reads nothing else."""
    policy, role = with_blocks(case, case.uniform(), rounding="adaround"), open_model(case.model).family.role
    layers = {
        name: layer.model_copy(update={"rounding": "adaround", "calls": "conditions"})
        if layer.is_quantized and role(name) in ("modulation", "embedding")
        else layer
        for name, layer in policy.layers.items()
    }
    return policy.model_copy(update={"layers": layers})


BUDGET = 16  # parameters of the rows that compare branches, as the rank of a low-rank one (methods.md 4.3)


def sides(case: Case, low_rank: int, grid: MonarchGrid | None) -> Policy:
    """Hadamard, GPTQ and the recipe's clip with these branches, fitted before and after the codes are chosen."""
    policy = case.uniform(hadamard=None, clip=None, rounding="gptq", low_rank=low_rank)
    return with_blocks(case, policy, monarch=grid, branch_init="refit")


def searched_sides(case: Case) -> Policy:
    return search_monarch(case.model, sides(case, BUDGET, None), case.calibration, seed=case.seed)


def baseline(case: Case) -> Policy:
    """RobuQ's own: Hadamard, the largest value of a token, a branch of the weight."""
    return with_blocks(case, case.uniform(hadamard=None, low_rank=case.rank), branch_init="weight")


def mixed(case: Case, recipe: str, **options: Any) -> Policy:
    """Widths of activations at the column's average, around the layers of "branch V3"."""
    return search(
        case.model,
        case.folder / f"{recipe}.json",
        recipe=recipe,
        calibration=case.calibration,
        base=case.column.recipe,
        budget=case.column.activation_bits,
        low_rank=case.rank,
        rounding="gptq",
        gain="none",
        branch_init="alternating",
        seed=case.seed,
        **options,
    )


def by_timestep(case: Case) -> Policy:
    """Widths of one layer share a grid, and of 8 bits there is no mid-rise one, by which 3 bits and fewer gain."""
    bits = (2, 3, 4, 5, 6, 8) if case.column.activation_bits > 3 else (2, 3, 4, 5, 6)
    return mixed(case, "adatsq", hessian="fisher", bits=bits)


EIGHT, SIX, FOUR, THREE = ("W8A8",), ("W6A6",), ("W4A4",), ("W3A3",)
T4, T3, T2, T1 = ("W1.58A4",), ("W1.58A3",), ("W1.58A2",), ("W1.58A1",)
LOW, TERNARY = FOUR + THREE, T4 + T3 + T2
TRAINED = 120  # steps
TRAINING = Settings(steps=TRAINED)
PEFT = Settings(steps=TRAINED, trained="branch")

ROWS = (
    Row("RTN", "round to nearest, absmax tokens", uniform, EIGHT + SIX + LOW + TERNARY),
    Row("RTN + Hadamard", "the same in rotated space", partial(uniform, hadamard=None), EIGHT + SIX + LOW + TERNARY),
    Row("GPTQ", "GPTQ, absmax tokens", partial(uniform, rounding="gptq"), LOW + T4),
    Row("Q-DiT-like", "GPTQ, group sizes searched (0.25 bits of scales a weight), symmetric", grouped, LOW),
    Row("Q-DiT-like, evolved", "the same bits, sizes by evolution on final latents", evolved, FOUR),
    Row("SmoothQuant", "alpha 0.5 where it folds, round to nearest", partial(smooth, alpha=0.5), EIGHT + SIX + LOW),
    Row("ViDiT-Q-like", "smoothing searched, Hadamard, nearest", partial(smooth, alpha=None, hadamard=None), LOW),
    Row(
        "QuaRot-like", "Hadamard, GPTQ, absmax tokens", partial(uniform, hadamard=None, rounding="gptq"), LOW + T4 + T3
    ),
    Row("SVDQuant-like", "smoothing searched, branch, groups of 64, GPTQ", smooth_branch, LOW + T4),
    Row(
        "LRQ-DiT-like",
        "Twin-Log weights (4- and 3-bit indices, stored as int8), Hadamard, zigzag after GELU, nearest",
        twin_log,
        LOW,
    ),
    Row("TR-DQ-like", "Hadamard, clip a layer, bits by 3 timestep groups at the column's mean, nearest", timed, LOW),
    Row("MPQ-DMv2-like", "nearest, binary residual of the most salient input channels", salient, LOW),
    Row("LSGQuant-like", "smoothing by channel maxima (alpha 1), Hadamard, nearest, V3 branch", lsg, LOW),
    Row(
        "PTQ4DiT",
        "salience balanced over steps where it folds, AdaRound on blocks' outputs, 200 steps each",
        reconstructed,
        EIGHT + SIX + FOUR,
    ),
    Row("PTQ4DiT + FIMA-Q objective", "Fisher-weighted", partial(reconstructed, objective="low_rank"), FOUR),
    Row("TFMQ", "AdaRound; modulation and embedders on every timestep and class", temporal, FOUR),
    Row(
        "TQ-DiT",
        "two regions after softmax and GELU, 10 time groups, integer attention",
        partial(tq_dit, groups=10),
        EIGHT + SIX,
    ),
    Row("TQ-DiT, 1 group", "the same steps for all timesteps", partial(tq_dit, groups=1), SIX),
    Row("TQ-DiT, GELU by token", "two regions after softmax only", partial(tq_dit, groups=10, regions=False), SIX),
    Row(
        "TQ-DiT, float attention",
        "two regions after GELU only",
        partial(tq_dit, groups=10, attention=False),
        EIGHT + SIX,
    ),
    Row("RobuQ baseline", "Hadamard, absmax tokens, V2 branch, nearest", baseline, TERNARY),
    Row("RobuQ PTQ", "Hadamard, clip, V2 branch, nearest; a mid-rise grid up to 2 bits", robuq, TERNARY + T1),
    Row("branch V1", "Hadamard, clip, GPTQ, branch of the residual", partial(branch, branch_init="residual"), T4 + T3),
    Row("branch V2", "Hadamard, clip, GPTQ, branch of the weight", partial(branch, branch_init="weight"), T4 + T3),
    Row("branch V3", "Hadamard, clip, GPTQ, branch alternating", branch, LOW + TERNARY + T1),
    Row("branch V3, mid-tread", "the same without the mid-rise grid", partial(branch, grid="mid-tread"), T3 + T2),
    Row(
        "branch V3, gain",
        "V3, the clip's loss of amplitude given back",
        partial(branch, gain="clip"),
        LOW + TERNARY + T1,
    ),
    Row("branch V3, no clip", "V3 with absmax tokens", partial(branch, clip="absmax"), LOW + T4 + T3),
    Row(
        "branch V3, ternary modulation",
        "V3, the adaLN linears ternary too, as in RobuQ",
        partial(branch, modulation="ternary"),
        T4 + T2,
    ),
    Row("branch weighted", "V3 in the norm of the inputs", partial(branch, branch_init="weighted"), T4 + T3),
    Row(
        "branch refit",
        "V2, refit in the norm of the inputs to what GPTQ leaves",
        partial(branch, branch_init="refit"),
        LOW + TERNARY,
    ),
    Row("low rank 16", "Hadamard, GPTQ, refit branch", partial(sides, low_rank=BUDGET, grid=None), LOW),
    *(
        Row(
            f"GMB {side} x {side}",
            f"the same with TreeQ's branch of as many parameters, blocks of rank {BUDGET // side}",
            partial(sides, low_rank=0, grid=MonarchGrid(side, side, BUDGET // side)),
            LOW if side == 4 else THREE,
        )
        for side in (2, 4, 8)
    ),
    Row("low rank 8 + GMB", "half of them in a 4 x 4 grid", partial(sides, low_rank=8, grid=MonarchGrid(4, 4, 2)), LOW),
    Row("GMB searched", "the split and grid of each layer by output error", searched_sides, THREE),
    Row("AdaTSQ GPTQ", "V3, Hessian weighted by Fisher scores", partial(branch, hessian="fisher"), LOW + T4 + T3),
    Row("AMPN", "V3, widths by sensitivity and knapsack (RobuQ)", partial(mixed, recipe="robuq-ampn"), THREE + T3 + T2),
    Row("TSS", "V3, widths by tree-structured search (TreeQ)", partial(mixed, recipe="treeq-tss"), THREE + T3),
    Row(
        "AdaTSQ",
        "V3, widths by layer and timestep group, Fisher-weighted GPTQ",
        by_timestep,
        LOW + T3,
    ),
    Row("RobuQ, trained", f"branch V3 and {TRAINED} steps of training", branch, TERNARY, TRAINING),
    Row(
        "QueST-like",
        f"Hadamard, GPTQ, {TRAINED} steps of training of the layers that it selects",
        partial(uniform, hadamard=None, rounding="gptq"),
        LOW,
        Settings(steps=TRAINED, trained="selective"),
    ),
    Row(
        "low rank 16, trained",
        f"the branch alone, {TRAINED} steps",
        partial(sides, low_rank=BUDGET, grid=None),
        THREE,
        PEFT,
    ),
    Row(
        "TreeQ GMB, trained",
        f"GMB 4 x 4, the branch alone, {TRAINED} steps",
        partial(sides, low_rank=0, grid=MonarchGrid(4, 4, BUDGET // 4)),
        THREE,
        PEFT,
    ),
)
