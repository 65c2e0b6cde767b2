"""Rules between keys of a configuration: keys that exclude each other, and keys without effect.

A rule yields a sentence with the key, the value, the rule and the remedy. It runs when pydantic
validates its section, so that all problems of a file are reported at once. A key without effect
gives a warning.
"""

from collections.abc import Iterable, Iterator, Sequence

from qpruner.config import schema
from qpruner.config.pruning import RATES, REDUCING
from qpruner.config.section import Idle, Section
from qpruner.quantization.formats import DENSE, GridFormat, ScaledFormat, formats

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


def _exactly_one(name: str, section: Section, keys: Sequence[str]) -> Iterator[str]:
    given = [key for key in keys if getattr(section, key) is not None]
    got = "none"
    if given:
        got = f"{', '.join(given)}: {take_out(*(f'{name}.{key}' for key in given))}"
    if len(given) != 1:
        yield f"give exactly one of {', '.join(keys)}; got {got}"


def _prune_rules(prune: schema.PruneConfig) -> Iterator[str]:
    by_rate = prune.layer_rate is not None
    yield from _exactly_one("prune", prune, RATES)
    rates = list(prune.rates or ())
    if rates != sorted(rates) or len(prune.cuts) < len(rates):
        yield f"`rates` must be different shares in ascending order, got {rates}"
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
    keys = [key for key in schema.BudgetConfig.model_fields if key != "flops_fraction"]
    yield from _exactly_one("quantize.budget", budget, keys)


def _quantize_rules(quantize: schema.QuantizeConfig) -> Iterator[str]:
    bits = list(quantize.bits or ())
    if quantize.formats and bits:
        yield f"give `formats` or `bits`, not both: {take_out('quantize.formats', 'quantize.bits')}"
    if bits != sorted(set(bits)):
        yield f"`bits` must be different bit-widths in ascending order, got {bits}"
    yield from _format_rules("formats", quantize.formats or (), list(formats()))
    tables = [name for name, known in formats().items() if known.holds_embeddings]
    yield from _format_rules("embeddings", quantize.embeddings, tables)


def _format_rules(key: str, names: Iterable[str], allowed: Sequence[str]) -> Iterator[str]:
    remedy = f"name some of {', '.join(allowed)}"
    for name in names:
        known = formats().get(name)
        if known is None:
            yield f"`{key}`: there is no format `{name}`; {remedy}"
        elif name not in allowed:
            yield f"`{key}`: {name} cannot hold embeddings; {remedy}"
        elif problem := known.missing():
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
    yield from _exactly_one("finetune", finetune, ("steps", "epochs"))


def _evaluate_rules(evaluate: schema.EvaluateConfig) -> Iterator[str]:
    others = [source.format for source in evaluate.text or () if source.format != "text"]
    if others:
        yield f"`text` is running text: give its sources `format: text`, got {', '.join(others)}"


def _run_rules(run: schema.RunConfig) -> Iterator[str]:
    levels = ", ".join(run.quantize.levels)
    if run.quantize.uses_grams and run.lora.init == "plain":
        grids = [
            name
            for name, known in formats().items()
            if isinstance(known, GridFormat) and known.takes_gptq
        ]
        if not set(grids) & set(run.quantize.levels):
            yield (
                f"`quantize.rounding: {run.quantize.rounding}` changes nothing with `lora.init: "
                f"plain` and the formats {levels}: take one of {', '.join(grids)}, or `lora.init: "
                "loftq`"
            )

    method = run.search.plan_method
    if method and method not in run.measured_methods:
        yield (
            f"`search.plan` takes the seed plan of {method}, which is not measured: name it in "
            f"`sensitivity.methods`, got {list(run.sensitivity.methods)}, and two formats or more "
            f"in `quantize.formats`, got {levels}; to name a file with that name, write "
            f"`./{method}`"
        )

    seen = sorted(set(run.search.tasks) & set(run.evaluate.tasks))
    if seen:
        yield (
            "`evaluate.tasks` must not share tasks with `search.tasks`, both name "
            f"{', '.join(seen)}: the report must use tasks that the search has not seen"
        )
    yield from _scale_rules(run)
    yield from _size_rules(run)
    yield from _worker_rules(run)


def _scale_rules(run: schema.RunConfig) -> Iterator[str]:
    if run.training.method != "scales":
        return
    scaled = [name for name, known in formats().items() if isinstance(known, ScaledFormat)]
    remedy = f"name some of {', '.join([*scaled, DENSE])}, or take `training.method: adapter`"
    for key, names in (
        ("formats", run.quantize.levels),
        ("embeddings", run.quantize.embedding_levels),
    ):
        others = [name for name in names if name not in (*scaled, DENSE)]
        if others:
            yield (
                f"`training.method: scales` needs formats with scales to train, but "
                f"`quantize.{key}` has {', '.join(others)}: {remedy}"
            )
    for form in run.serve.to:
        if form.endswith("_merged"):
            yield (
                f"`training.method: scales` gives one plain file, without an adapter to merge, but "
                f"`serve.to` has {form}: name {form.removesuffix('_merged')}"
            )
        server = form.partition("_")[0]
        lacking = [name for name in run.quantize.levels if not _stores(server, name)]
        if lacking:
            yield (
                f"`training.method: scales` trains what a file stores, but a file for {server} "
                f"(`serve.to`) cannot store {', '.join(lacking)}: name other formats in "
                "`quantize.formats`, or take `training.method: adapter`"
            )


def _stores(server: str, name: str) -> bool:
    """Return True if a file for `gguf` or `vllm` can store a format that has scales."""
    known = formats().get(name)
    if known is None or not isinstance(known, ScaledFormat):
        return True  # unpacked, or refused by another rule
    return bool(known.ggml_type) == (server == "gguf")


def _size_rules(run: schema.RunConfig) -> Iterator[str]:
    size, value = run.quantize.budget.size
    if size not in ("fraction", "mean_bits"):
        return
    if len(run.prune.cuts) > 1:
        which = "several cuts (`prune.rates`)"
    elif run.quantize.embedding_levels != (DENSE,):
        which = "packed embeddings (`quantize.embeddings`)"
    else:
        return
    got = f"{value:g}"
    if "budget" not in run.quantize.model_fields_set:
        got += ", the default"
    yield (
        f"`quantize.budget.{size}` has no one meaning with {which}, got {got}: give the size that "
        "you want, `quantize.budget.gib` or `quantize.budget.bytes`"
    )


def _worker_rules(run: schema.RunConfig) -> Iterator[str]:
    workers = run.finetune.num_workers
    training = run.training
    if training.batch_size % (workers * training.micro_batch_size):
        yield (
            "`training.batch_size` must be a multiple of `finetune.num_workers` x "
            f"`training.micro_batch_size` ({workers} x {training.micro_batch_size}), got "
            f"{training.batch_size}: the workers share every batch; take fewer workers, a smaller "
            "micro-batch or another batch size"
        )
    resources = run.search.resources_per_trial or schema.ResourcesConfig()
    gpus = resources.gpu or 0
    if workers > 1 and gpus > 1:
        yield (
            f"`finetune.num_workers` above 1 needs workers with one GPU each, got {workers} with "
            f"`search.resources_per_trial.gpu` {gpus:g}: a fine-tune spreads its model over "
            "several GPUs, or shares its batches among workers, not both"
        )


# ---- keys without effect


def _idle_in_prune(prune: schema.PruneConfig) -> Iterator[Idle]:
    if prune.is_off:
        others = [key for key in schema.PruneConfig.model_fields if key not in RATES]
        if prune.uniform:  # it implies `selection`
            others.remove("selection")
        yield f"`prune.{'rates' if prune.rates else 'rate'}` is 0", others
    if not prune.width_units:
        only = "`prune.units` names whole blocks only"
        yield only, OF_UNITS
        if prune.steps != 1:
            yield only, ["steps"]
        if not prune.uniform:
            yield only, ["selection"]
    if not prune.drops_blocks:
        yield "`prune.units` does not name block", ["depth_share"]
    if prune.compensates_by != "least_squares":
        yield f"`prune.compensation` is {prune.compensation}", ["ridge"]

    importance = f"`prune.importance` is {prune.importance}"
    if prune.importance != "taylor":
        yield importance, ["order"]
    if prune.importance not in ("fisher", "taylor"):
        yield importance, ["aggregation"]
    if prune.importance != "magnitude":
        yield importance, ["norm"]
    if prune.importance not in REDUCING:
        yield importance, ["reduction", "query_heads"]


def _idle_in_quantize(quantize: schema.QuantizeConfig) -> Iterator[Idle]:
    if quantize.rounding != "tuned":
        yield f"`quantize.rounding` is {quantize.rounding}", ["tuning"]
    doubled = [name for name, known in formats().items() if known.doubled]
    if not set(doubled) & set(quantize.named):
        yield f"{' or '.join(doubled)} is not among the formats", ["double_quant"]


def _idle_in_lora(lora: schema.LoraConfig) -> Iterator[Idle]:
    if lora.init == "plain":
        yield "`lora.init` is plain", ["loftq_iterations", "svd"]


def _idle_in_sensitivity(sensitivity: schema.SensitivityConfig) -> Iterator[Idle]:
    if not sensitivity.methods:
        yield "`sensitivity.methods` is empty", ["batch_size"]
    of_information = ["num_components", "num_neighbors", "num_shuffles", "max_positions"]
    for methods, keys in (
        (schema.INFORMATION, of_information),
        (schema.MEASUREMENT, ["num_measured_samples"]),
    ):
        if not set(methods) & set(sensitivity.methods):
            yield f"`sensitivity.methods` lacks {' and '.join(methods)}", keys


def _idle_in_search(search: schema.SearchConfig) -> Iterator[Idle]:
    if not search.tasks:
        yield "`search.tasks` is empty", ["limit"]


def _idle_in_finetune(finetune: schema.FinetuneConfig) -> Iterator[Idle]:
    if not finetune.compare:
        yield "`finetune.compare` is false", ["seeds", "random_plans"]


def _idle_in_serve(serve: schema.ServeConfig) -> Iterator[Idle]:
    if not serve.to:
        yield "`serve.to` is empty", ["threads"]


def _idle_in_run(run: schema.RunConfig) -> Iterator[Idle]:
    """Yield the keys, as `section.key`, that have no effect because of another section.

    A given `search.plan` gives no warning for the keys of the search: `--plan` may be added to any
    configuration. `calibration.num_sensitivity_samples` always has an effect: `qpruner compare`
    pairs losses only if it is equal.
    """
    only = f"{', '.join(run.quantize.levels)} is the only format (`quantize`), so nothing is"
    if not run.has_choice:
        yield f"{only} searched", [f"search.{key}" for key in OF_SEARCHING]
    if not run.quantize.has_choice:
        fields = schema.SensitivityConfig.model_fields
        yield f"{only} measured", [f"sensitivity.{key}" for key in fields]


schema.PruneConfig.rules = _prune_rules
schema.PruneConfig.idle_keys = _idle_in_prune
schema.BudgetConfig.rules = _budget_rules
schema.QuantizeConfig.rules = _quantize_rules
schema.QuantizeConfig.idle_keys = _idle_in_quantize
schema.LoraConfig.idle_keys = _idle_in_lora
schema.TrainingConfig.rules = _training_rules
schema.SensitivityConfig.idle_keys = _idle_in_sensitivity
schema.ResourcesConfig.rules = _resources_rules
schema.SearchConfig.rules = _search_rules
schema.SearchConfig.idle_keys = _idle_in_search
schema.FinetuneConfig.rules = _finetune_rules
schema.FinetuneConfig.idle_keys = _idle_in_finetune
schema.EvaluateConfig.rules = _evaluate_rules
schema.ServeConfig.idle_keys = _idle_in_serve
schema.RunConfig.rules = _run_rules
schema.RunConfig.idle_keys = _idle_in_run
