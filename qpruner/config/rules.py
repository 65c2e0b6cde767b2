"""Rules between keys of a configuration: keys that exclude each other, and keys without effect.

A rule yields a sentence with the key, the value, the rule and the remedy. It runs when pydantic
validates its section, so that all problems of a file are reported at once. A key without effect
gives a warning.
"""

from collections.abc import Iterator

from qpruner.config import schema
from qpruner.config.pruning import RATES, REDUCING
from qpruner.config.section import Idle
from qpruner.quantization.formats import DENSE, GridFormat, formats

OF_UNITS = (
    "importance",
    "order",
    "aggregation",
    "norm",
    "reduction",
    "query_heads",
    "round_to",
    "depth_share",
)
"""Keys of `prune` that apply to units inside blocks only."""
OF_SEARCHING = ("searcher", "max_trials", "max_hours", "max_gpu_hours", "confirm", "confirm_seeds")
"""Keys of `search` that apply only if several plans are tried."""


def take_out(*keys: str) -> str:
    """Say how to remove a key, or one of several keys, in the file or on the command line."""
    options = " or ".join(f"`--set {key}=`" for key in keys)
    return f"take {'it' if len(keys) == 1 else 'one'} out (on the command line {options})"


# ---- keys that exclude each other


def _prune_rules(prune: schema.PruneConfig) -> Iterator[str]:
    by_rate = prune.layer_rate is not None
    given = [key for key in RATES if getattr(prune, key) is not None]
    if len(given) != 1:
        got = f"several: {take_out(*(f'prune.{key}' for key in given))}" if given else "none"
        yield f"give one of `rates`, `rate` and `layer_rate`, got {got}"
    if prune.rates and (
        list(prune.rates) != sorted(prune.rates) or len(prune.cuts) < len(prune.rates)
    ):
        yield f"`rates` must be different shares in ascending order, got {list(prune.rates)}"
    if by_rate and prune.drops_blocks:
        yield "`layer_rate` applies to units inside blocks only: take `block` out of `units`"
    for key, needs in (("layer_rate", by_rate), ("uniform", prune.uniform)):
        if needs and prune.selection == "global":
            remedy = take_out("prune.selection")
            yield f"`{key}` needs `selection: per_layer`, its default; got global: {remedy}"
    if prune.reduction == "product" and prune.selection == "global" and prune.width_units:
        yield (
            "`reduction: product` needs `selection: per_layer`: heads and channels have different "
            "numbers of "
            "matrices, so their products cannot be compared; or take another reduction, such as sum"
        )


def _budget_rules(budget: schema.BudgetConfig) -> Iterator[str]:
    given = [name for name, value in budget if value is not None and name != "flops_fraction"]
    if len(given) != 1:
        named = [f"quantize.budget.{name}" for name in given]
        remedy = f"{', '.join(given)}: {take_out(*named)}" if given else "none"
        yield f"give exactly one of fraction, mean_bits, gib, bytes; got {remedy}"


def _quantize_rules(quantize: schema.QuantizeConfig) -> Iterator[str]:
    bits, known = quantize.bits, formats()
    if quantize.formats and bits:
        yield f"give `formats` or `bits`, not both: {take_out('quantize.formats', 'quantize.bits')}"
    if bits and list(bits) != sorted(set(bits)):
        yield f"`bits` must be different bit-widths in ascending order, got {list(bits)}"
    for key, names in {
        "formats": quantize.formats or (),
        "embeddings": quantize.embeddings,
    }.items():
        holds = [name for name, each in known.items() if key == "formats" or each.holds_embeddings]
        for name in names:
            if name not in known:
                yield f"`{key}`: there is no format `{name}`; name some of {', '.join(holds)}"
            elif name not in holds:
                yield f"`{key}`: {name} cannot hold embeddings; name some of {', '.join(holds)}"
            elif problem := known[name].missing():
                yield f"`{key}`: {name} cannot be packed: {problem}, or name other formats"


def _training_rules(training: schema.TrainingConfig) -> Iterator[str]:
    if training.batch_size % training.micro_batch_size:
        yield (
            f"`batch_size` must be a multiple of `micro_batch_size`, got {training.batch_size} and "
            f"{training.micro_batch_size}: take another batch size or a smaller micro-batch"
        )


def _resources_rules(resources: schema.ResourcesConfig) -> Iterator[str]:
    if resources.gpu is not None and resources.gpu > 1 and resources.gpu != int(resources.gpu):
        yield (
            "`gpu` must be a share of one GPU, such as 0.5, or a whole number, got "
            f"{resources.gpu:g}"
        )


def _search_rules(search: schema.SearchConfig) -> Iterator[str]:
    if search.first_rung > search.steps:
        yield f"`first_rung` must be at most `steps` ({search.steps}), got {search.first_rung}"
    if search.by_accuracy and not search.tasks:
        yield f"`metric: {search.metric}` needs at least one task under `tasks`"
    elif search.by_accuracy and (search.limit is None or search.limit < 2):
        yield (
            f"`metric: {search.metric}` needs a `limit` of at least 2, since one question has no "
            "standard error and "
            f"the questions after the limit choose the winner, got {search.limit}"
        )


def _finetune_rules(finetune: schema.FinetuneConfig) -> Iterator[str]:
    if (finetune.steps is None) == (finetune.epochs is None):
        given = (
            "neither"
            if finetune.steps is None
            else f"both: {take_out('finetune.steps', 'finetune.epochs')}"
        )
        yield f"give exactly one of `steps` and `epochs`, got {given}"


def _evaluate_rules(evaluate: schema.EvaluateConfig) -> Iterator[str]:
    if other := [source.format for source in evaluate.text or () if source.format != "text"]:
        yield f"`text` is running text: give its sources `format: text`, got {', '.join(other)}"


def _run_rules(run: schema.RunConfig) -> Iterator[str]:
    method, levels, training = run.search.plan_method, run.quantize.levels, run.training
    if run.quantize.rounding == "gptq" and run.lora.init == "plain":
        grids = [
            name
            for name, each in formats().items()
            if isinstance(each, GridFormat) and each.takes_gptq
        ]
        if not set(grids) & set(levels):
            yield (
                "`quantize.rounding: gptq` changes nothing with `lora.init: plain` and the "
                "formats "
                f"{', '.join(levels)}: take one of {', '.join(grids)}, or `lora.init: loftq`"
            )
    if method and method not in run.measured_methods:
        yield (
            f"`search.plan` takes the seed plan of {method}, which is not measured: name it in "
            f"`sensitivity.methods`, got {list(run.sensitivity.methods)}, and two formats or more "
            f"in `quantize.formats`, got {', '.join(levels)}; to name a file with that name, write "
            f"`./{method}`"
        )
    if seen := sorted(set(run.search.tasks) & set(run.evaluate.tasks)):
        yield (
            "`evaluate.tasks` must not share tasks with `search.tasks`, both name "
            f"{', '.join(seen)}: the report must use tasks that the search has not seen"
        )
    (size, value), several = run.quantize.budget.size, len(run.prune.cuts) > 1
    if size in ("fraction", "mean_bits") and (several or run.quantize.embedding_levels != (DENSE,)):
        which = (
            "several cuts (`prune.rates`)"
            if several
            else "packed embeddings (`quantize.embeddings`)"
        )
        yield (
            f"`quantize.budget.{size}` has no one meaning with {which}, got {value:g}"
            f"{', the default' * ('budget' not in run.quantize.model_fields_set)}: give the size "
            "that you want, `quantize.budget.gib` or `quantize.budget.bytes`"
        )
    workers, asked = run.finetune.num_workers, run.search.resources_per_trial
    if training.batch_size % (workers * training.micro_batch_size):
        yield (
            "`training.batch_size` must be a multiple of `finetune.num_workers` x "
            "`training.micro_batch_size` "
            f"({workers} x {training.micro_batch_size}), got {training.batch_size}: the workers "
            "share every batch; take fewer workers, a smaller micro-batch or another batch size"
        )
    gpus = (asked.gpu if asked else None) or 0
    if workers > 1 and gpus > 1:
        yield (
            f"`finetune.num_workers` above 1 needs workers with one GPU each, got {workers} with "
            f"`search.resources_per_trial.gpu` {gpus:g}: a fine-tune spreads its model over "
            "several GPUs, or shares its batches among workers, not both"
        )


# ---- keys without effect


def _idle_in_prune(prune: schema.PruneConfig) -> tuple[Idle, ...]:
    blocks_only, importance = not prune.width_units, f"`prune.importance` is {prune.importance}"
    only = "`prune.units` names whole blocks only"
    # `uniform` implies `selection`.
    others = [
        key
        for key in schema.PruneConfig.model_fields
        if key not in RATES and not (key == "selection" and prune.uniform)
    ]
    return (
        (prune.is_off, f"`prune.{'rates' if prune.rates else 'rate'}` is 0", tuple(others)),
        (blocks_only, only, OF_UNITS),
        (blocks_only and prune.steps != 1, only, ("steps",)),
        (blocks_only and not prune.uniform, only, ("selection",)),
        (not prune.drops_blocks, "`prune.units` does not name block", ("depth_share",)),
        (
            prune.compensates_by != "least_squares",
            f"`prune.compensation` is {prune.compensation}",
            ("ridge",),
        ),
        (prune.importance != "taylor", importance, ("order",)),
        (prune.importance not in ("fisher", "taylor"), importance, ("aggregation",)),
        (prune.importance != "magnitude", importance, ("norm",)),
        (prune.importance not in REDUCING, importance, ("reduction", "query_heads")),
    )


def _idle_in_quantize(quantize: schema.QuantizeConfig) -> tuple[Idle, ...]:
    doubled = [name for name, each in formats().items() if each.doubled]
    none = not set(doubled) & set(quantize.named)
    return ((none, f"{' or '.join(doubled)} is not among the formats", ("double_quant",)),)


def _idle_in_sensitivity(sensitivity: schema.SensitivityConfig) -> tuple[Idle, ...]:
    methods = set(sensitivity.methods)
    of_information = ("num_components", "num_neighbors", "num_shuffles", "max_positions")
    by_methods = (
        (schema.INFORMATION, of_information),
        (schema.MEASUREMENT, ("num_measured_samples",)),
    )
    return (
        (not methods, "`sensitivity.methods` is empty", ("batch_size",)),
        *(
            (not set(needed) & methods, f"`sensitivity.methods` lacks {' and '.join(needed)}", keys)
            for needed, keys in by_methods
        ),
    )


def _idle_in_run(run: schema.RunConfig) -> tuple[Idle, ...]:
    """Return the keys, as `section.key`, that have no effect because of another section.

    A given `search.plan` gives no warning for the keys of the search: `--plan` may be added to any
    configuration. `calibration.num_sensitivity_samples` always has an effect: `qpruner compare`
    pairs losses only if it is equal.
    """
    only = f"{', '.join(run.quantize.levels)} is the only format (`quantize`), so nothing is"
    searched = (f"search.{key}" for key in OF_SEARCHING)
    measured = (f"sensitivity.{key}" for key in schema.SensitivityConfig.model_fields)
    return (
        (not run.has_choice, f"{only} searched", tuple(searched)),
        (not run.quantize.has_choice, f"{only} measured", tuple(measured)),
    )


schema.PruneConfig.rules, schema.PruneConfig.idle_keys = _prune_rules, _idle_in_prune
schema.BudgetConfig.rules = _budget_rules
schema.QuantizeConfig.rules = _quantize_rules
schema.QuantizeConfig.idle_keys = _idle_in_quantize
schema.LoraConfig.idle_keys = lambda own: (
    (own.init == "plain", "`lora.init` is plain", ("loftq_iterations", "svd")),
)
schema.TrainingConfig.rules = _training_rules
schema.SensitivityConfig.idle_keys = _idle_in_sensitivity
schema.ResourcesConfig.rules = _resources_rules
schema.SearchConfig.rules = _search_rules
schema.SearchConfig.idle_keys = lambda own: (
    (not own.tasks, "`search.tasks` is empty", ("limit",)),
)
schema.FinetuneConfig.rules = _finetune_rules
schema.FinetuneConfig.idle_keys = lambda own: (
    (not own.compare, "`finetune.compare` is false", ("seeds", "random_plans")),
)
schema.EvaluateConfig.rules = _evaluate_rules
schema.ServeConfig.idle_keys = lambda own: ((not own.to, "`serve.to` is empty", ("threads",)),)
schema.RunConfig.rules, schema.RunConfig.idle_keys = _run_rules, _idle_in_run
