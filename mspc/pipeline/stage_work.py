"""The work of every stage of a run on one rank, under the titles that the run gives its stages."""

import math
from collections.abc import Callable

from mspc.formats.layout import num_bytes
from mspc.passes.distillation import CHECKS
from mspc.passes.gradients import fisher_block_size
from mspc.passes.together import FEW
from mspc.pipeline.cost import CHECKED_TOKENS
from mspc.pipeline.own_text import ROWS as SEQUENCES_AT_ONCE
from mspc.pipeline.rates import STARTING
from mspc.pipeline.recovery_stage import BATCH_SIZE, LENGTH, MOST_VALIDATION
from mspc.pipeline.solve_blocks import num_together
from mspc.pipeline.solver_work import MatrixWork
from mspc.pipeline.workload import Work, Workload
from mspc.planning.allocation import INTERPOLATIONS
from mspc.planning.curve_measurement import patterns_of
from mspc.settings import ESTIMATE, SEARCH
from mspc.threads import LEAST_ROWS, TILES
from mspc.types import Matrix, Target

REST = "the rest"
"""The title of what is no stage."""
SECONDS_OF_TIMINGS = 40
"""Seconds of timing all products, unless they are known."""
TYPICAL_PASSES = 7
"""Operations on the gradients of outputs, before their second moment."""
HEAD, HEAD_BACKWARD, DIVERGENCE = 4, 6, 6
"""Operations on logits: log-probabilities, the gradient of a loss, and a divergence."""
OF_HIDDEN, OF_OUTPUTS = 16, 2.5
"""Operations of a pass on hidden states and on the outputs of matrices: norms, rotations, activations, sums."""


def stages_of(load: Workload) -> dict[str, Work]:
    """The work of each stage in the order in which a run enters them, without those that it skips, and of the rest."""
    settings = load.settings
    stages: dict[str, Callable[[Workload, Work], None]] = {}
    if settings.keep_zeros:
        stages["Reading zeros"] = _reading_zeros
    if settings.has_time_budget and settings.timings is None:
        stages["Timing products"] = lambda load, work: work.add("seconds", SECONDS_OF_TIMINGS)
    stages["Checking weights"] = _checking
    if settings.calibration == "self":
        stages["Writing calibration text"] = _writing_text
    stages["Trying the dense model"] = _trying
    if settings.needs_fisher or settings.needs_curves:
        stages["Gradients"] = _gradients
    if settings.needs_sensitivity:
        stages[f"Sensitivity ({settings.measure})"] = _sensitivity
    if settings.needs_curves:
        stages["Loss curves"] = _curves
    if settings.needs_curves and not settings.has_budget and settings.allocator == SEARCH:
        stages["Search (seconds)"] = lambda load, work: work.add("seconds", 60 * load.settings.search_minutes)
    elif settings.validates_plans:
        stages["Validating plans"] = _validating
    stages["Copying other weights"] = _copying
    stages["Compressing"] = _compressing
    if settings.recover:
        stages["Passing the dense model"] = _passing
        stages["Recovering"] = _recovering
    if settings.eval:
        stages["Evaluating"] = _evaluating
    stages[REST] = _rest
    found = {}
    for title, count in stages.items():
        found[title] = Work()
        count(load, found[title])
    return found


def _pass(
    load: Workload, work: Work, tokens: int, times: float = 1, *, operations: float = 1, shows: bool = False
) -> None:
    """Tokens through all blocks. A gradient takes `times` the products, and `operations` those on memory.

    `shows`: experts are shown all tokens where the settings say so.
    """
    kind = "product" if load.itemsize == 4 else "half"
    ways = max(tokens / load.batch_tokens / work.ranks, 1)
    for index, active in enumerate(load.active_numel):
        outputs = sum(matrix.shape[0] for matrix in load.matrices[index]) or 2 * load.hidden
        count = max(len(load.matrices[index]), 1)
        attention = 4 * min(load.length, tokens) * load.attention_width
        shown = load.shown_numel[index] if shows else 0
        work.add(kind, times * tokens * (2 * (active + shown) + attention), ways)
        batches = max(tokens / load.batch_tokens, 1)
        size = min(tokens, load.batch_tokens) * load.itemsize / 4
        work.operations(size * load.hidden, operations * OF_HIDDEN * batches, ways)
        work.operations(size * outputs / count, operations * OF_OUTPUTS * batches * count, ways)


def _read(load: Workload, work: Work, times: float, *, outer: bool = False) -> None:
    """All blocks from the files, `times` times, or with `outer` all other weights."""
    numel = load.outer_numel if outer else sum(load.block_numel)
    with work.shared(1):
        work.add("read", times * numel * load.stored_itemsize)


def _head(load: Workload, work: Work, tokens: int, operations: float, times: float = 1) -> None:
    """Logits of tokens, and operations on them."""
    kind = "product" if load.itemsize == 4 else "half"
    ways = max(tokens / load.length / work.ranks, 1)
    work.add(kind, 2 * times * tokens * load.vocabulary * load.hidden, ways)
    work.operations(float(load.length) * load.vocabulary, operations * tokens / load.length, ways)
    _read(load, work, 1, outer=True)


def _gram(load: Workload, work: Work, tokens: int, *, shift: bool = False) -> None:
    """The Gram of every input, and its shift."""
    # On a GPU inputs of 16 bits are multiplied by TF32, at half of their own rate, and differences in two parts.
    in_tf32 = load.itemsize != 4 and load.device.type != "cpu"
    kind, times = ("half", 2) if in_tf32 else ("product", 1)
    for width, seen in load.gram_inputs(tokens):
        ways = width / 256
        work.add(kind, times * seen * width * (width + 256), ways)
        work.operations(width**2, 6)
        if shift:
            work.add(kind, times**2 * 2 * seen * width * width, ways)
            work.operations(float(load.batch_tokens) * width, 2 * times * seen / load.batch_tokens, ways)
            work.operations(width**2, 2)
        if load.itemsize != 4:
            work.operations(float(load.batch_tokens) * width, 2 * seen / load.batch_tokens, ways)
        _sum(load, work, (1 + shift) * width**2)


def _sum(load: Workload, work: Work, numbers: float) -> None:
    """Sums of float32 numbers of all ranks: each sends its own to those that add them, and then what it added."""
    if load.ranks > 1:
        with work.shared(1):
            work.add("exchange", 8 * numbers)


def _preconditioners(load: Workload, work: Work, ways: float = 1) -> None:
    """The factor of every Gram by which the search takes its steps."""
    for groups in load.groups:
        for group in groups:
            work.add("factor", group[0].shape[1] ** 3, ways)
            work.operations(group[0].shape[1] ** 2, 6)


def _reading_zeros(load: Workload, work: Work) -> None:
    _read(load, work, 1)
    for matrix in load.flat:
        work.operations(matrix.numel, 1)


def _checking(load: Workload, work: Work) -> None:
    files = len(load.model.source.shards())
    with work.shared(min(load.ranks, files)):
        work.add("read", load.source_bytes)
        work.add("hash", load.source_bytes)
        work.operations(load.numel / max(len(load.flat), 1), 1.5 * max(len(load.flat), 1))


def _writing_text(load: Workload, work: Work) -> None:
    """One token of some sequences at a time: the weights are read for each."""
    for tokens in (load.tokens, load.validation_tokens, load.test_tokens):
        steps = load.length * -(-tokens // (load.length * SEQUENCES_AT_ONCE))
        kind = "product" if load.itemsize == 4 else "half"
        work.add("near", steps * load.numel * load.stored_itemsize)
        work.add(kind, 2 * tokens * load.numel)
        work.add("call", steps * load.blocks * 60)
    _read(load, work, 1)


def _trying(load: Workload, work: Work) -> None:
    _pass(load, work, tried_tokens(load))
    _read(load, work, 1)


def _rest(load: Workload, work: Work) -> None:
    """The start, and the logits of the trial and of the validation, which come after their stages."""
    work.add("seconds", STARTING[load.device.type])
    _head(load, work, tried_tokens(load), HEAD)
    if load.settings.validates_plans:
        plans, tokens = 1 + len(INTERPOLATIONS), load.validation_tokens
        with work.shared(load.parts):
            _head(load, work, tokens * (1 + plans), HEAD)
            work.operations(float(load.length) * load.vocabulary, DIVERGENCE * plans * tokens / load.length)


def tried_tokens(load: Workload) -> int:
    return min(max(1, CHECKED_TOKENS // load.length) * load.length, load.tokens)


def _gradients(load: Workload, work: Work) -> None:
    tokens = load.measured_tokens
    rounds = max(tokens / load.batch_tokens / load.parts / max(load.threads, 1), 1)
    _read(load, work, 2 * rounds)
    _read(load, work, 2 * (rounds - 1), outer=True)
    batches = max(tokens / load.batch_tokens, 1)
    with work.shared(load.parts):
        _pass(load, work, tokens, 3, operations=4)
        _head(load, work, tokens, HEAD + HEAD_BACKWARD, 2)
        for matrix in load.flat:
            rows = matrix.shape[0]
            work.add("product", 2 * tokens * rows * fisher_block_size(rows), batches)
            work.operations(float(load.batch_tokens) * rows, TYPICAL_PASSES * batches, batches)
    _sum(load, work, sum(matrix.shape[0] * fisher_block_size(matrix.shape[0]) for matrix in load.flat))


def _sensitivity(load: Workload, work: Work) -> None:
    measure, tokens = load.settings.measure, load.tokens
    if measure == "exponents":
        for matrix in load.flat:
            work.add("eigen", min(matrix.shape) ** 3)
            work.add("product", 2 * matrix.numel * min(matrix.shape))
        _read(load, work, 1)
    elif measure in ("gram", "outliers"):
        with work.shared(load.parts):
            _pass(load, work, tokens, shows=True)
            _gram(load, work, tokens)
        _read(load, work, 1)
    else:
        second = measure == "hutchinson"
        times = 8 * load.settings.sensitivity_probes if second else 4
        with work.shared(load.parts):
            _pass(load, work, load.measured_tokens, times, operations=times)
            _head(load, work, load.measured_tokens, (HEAD + HEAD_BACKWARD) * (3 if second else 1), 6 if second else 2)
        _read(load, work, 2 * load.measured_tokens / load.length / 8)


def _dense_walk(load: Workload, work: Work) -> None:
    with work.shared(load.parts):
        _pass(load, work, load.measured_tokens, shows=True)
        _gram(load, work, load.measured_tokens)
    _read(load, work, 1)


def _curves(load: Workload, work: Work) -> None:
    _dense_walk(load, work)
    with work.shared(_by_blocks(load)):
        _measured(load, work)


def _by_blocks(load: Workload) -> float:
    """Ranks that share the blocks of a dense model, or the matrices of blocks with experts."""
    if any(matrix.index is not None for matrix in load.flat):
        return load.ranks
    return load.blocks / math.ceil(load.blocks / load.ranks)


def _measured(load: Workload, work: Work) -> None:
    settings, patterns = load.settings, patterns_of(load.settings)
    estimates = settings.allocator == ESTIMATE
    if not estimates and settings.solver in ("kfac", "fisher", "admm"):
        _preconditioners(load, work, FEW)
    if settings.has_budget:
        for groups in load.groups:
            for group in groups:
                work.add("factor", group[0].shape[1] ** 3)
    for matrix in load.flat:
        own = MatrixWork(work, matrix.shape, FEW)
        if estimates:
            own.estimated(patterns)
        else:
            own.curve(patterns, settings)


def _validating(load: Workload, work: Work) -> None:
    plans = 1 + len(INTERPOLATIONS)
    if keeps_grams(load):
        _read(load, work, 1)
    else:
        _dense_walk(load, work)
        with work.shared(_by_blocks(load)):
            _preconditioners(load, work, FEW)
    patterns = [load.plan[0].target.pattern] * plans
    for matrix in load.flat:
        with work.shared(_by_blocks(load)):
            own = MatrixWork(work, matrix.shape, FEW)
            own.form()
            own.decomposed(True)
            for pattern in patterns:
                own.path([pattern], True)
        _sum(load, work, plans * matrix.numel / 2)
    with work.shared(load.parts):
        for _ in range(1 + plans):
            _pass(load, work, load.validation_tokens)
    _read(load, work, 1 + plans)


def keeps_grams(load: Workload) -> bool:
    """Tell if the Grams of the curves stay in memory for the validation of plans, as `DenseWalk` decides."""
    return 16 * sum(matrix.shape[1] ** 2 for matrix in load.flat) <= load.free_bytes // 4


def _copying(load: Workload, work: Work) -> None:
    rest = load.source_bytes - sum(matrix.numel for matrix in load.flat) * load.stored_itemsize
    work.add("read", rest)
    work.add("write", rest)


def _compressing(load: Workload, work: Work) -> None:
    settings = load.settings
    two_streams = bool(settings.propagation or settings.reconstruct)
    with work.shared(load.parts):
        for _ in range(1 + two_streams):
            _pass(load, work, load.tokens, shows=True)
        _gram(load, work, load.tokens, shift=two_streams)
    _read(load, work, 1)
    kfac = settings.solver == "kfac" and settings.needs_fisher
    inverts = settings.propagation > 0 or settings.solver == "obs" or load.quantizing
    for groups in load.groups:
        for group in groups:
            width = group[0].shape[1]
            if kfac:
                work.add("factor", width**3)
            if inverts:
                work.add("factor", width**3)
            work.operations(width**2, 12)
    targets = {matrix.name: matrix.target for matrix in load.plan}
    for group in (group for of_block in load.groups for group in of_block):
        for matrix in group:
            ways = len(group) if matrix.index is None and load.ranks == 1 else 1
            with work.shared(1 if matrix.index is None else load.ranks):
                _solved(load, work, matrix, targets[matrix.name], kfac, ways)
    if settings.reconstruct:
        tokens = 1024 * settings.reconstruct
        _pass(load, work, tokens, 3, operations=4)


def _solved(load: Workload, work: Work, matrix: Matrix, target: Target, kfac: bool, ways: int) -> None:
    """The work on a matrix, one of as many as `ways` with its input."""
    least = LEAST_ROWS[load.device.type]
    pieces = min(matrix.shape[0] // least, TILES) if load.ranks > 1 and matrix.index is None else 1
    settings, ranks = load.settings, max(min(pieces, load.ranks), 1)
    own = MatrixWork(work, matrix.shape, ways, ranks=ranks, together=num_together(matrix, settings, load.device))
    if settings.propagation:
        own.compensated()
    if settings.solver in ("kfac", "fisher", "admm"):
        own.searched(target, settings, kfac)
    elif settings.solver == "obs":
        own.swept(codes=target.grid is not None)
        own.selected(1, target.pattern)
    else:
        own.operations(8)
        own.selected(1, target.pattern)
    stored = num_bytes(matrix.shape, target, load.stored_dtype)
    own.judged_and_stored(codes=target.grid is not None, num_bytes=stored)


def _passing(load: Workload, work: Work) -> None:
    _pass(load, work, recovered_tokens(load))
    _read(load, work, 1)


def recovered_tokens(load: Workload) -> int:
    """Tokens of all different sequences of a recovery, and of its validation text."""
    length = min(load.length, LENGTH)
    used = min(load.settings.recover * BATCH_SIZE, load.tokens // length)
    return (used + min(load.validation_tokens // length, MOST_VALIDATION)) * length


def _recovering(load: Workload, work: Work) -> None:
    length = min(load.length, LENGTH)
    tokens = load.settings.recover * BATCH_SIZE * length
    validated = CHECKS * min(load.validation_tokens, MOST_VALIDATION * length)
    _pass(load, work, tokens, 4, operations=5)
    _pass(load, work, validated)
    _head(load, work, tokens, 3 * HEAD + HEAD_BACKWARD, 4)
    _head(load, work, validated, 2 * HEAD + DIVERGENCE, 2)
    for matrix in load.flat:
        work.operations(matrix.numel, 20 * load.settings.recover)
    _read(load, work, 1)


def _evaluating(load: Workload, work: Work) -> None:
    tokens = load.test_tokens
    for _ in range(2):
        _pass(load, work, tokens)
    _head(load, work, 2 * tokens, HEAD + DIVERGENCE / 2)
    _read(load, work, 1)
    for matrix in load.flat:
        work.operations(matrix.numel, 8)
