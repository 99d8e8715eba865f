"""Forms of the JSON files in a folder.

A file may come from a stranger, and its checksum only shows that it is complete, not that it is honest. So types and
ranges are checked before use.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, StringConstraints, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from diffes.errors import DiffesError

AGAIN = "restore it or run `diffes search` again"

Count = Annotated[int, Field(ge=0, le=2**53)]
Number = Annotated[int, Field(ge=1, le=2**53)]
Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=4096)]  # safe to print
Prompt = Annotated[str, StringConstraints(pattern=r"\S")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Range = Annotated[list[Count], Field(min_length=2, max_length=2)]
Coefficients = Annotated[list[Annotated[list[float], Field(min_length=2, max_length=1001)]], Field(min_length=1)]
CostTable = Annotated[list[Annotated[list[Amount], Field(min_length=1)]], Field(min_length=1)]


TOLD = {  # plain messages in place of some of pydantic's
    "model_type": "it should be a JSON object",
    "string_pattern_mismatch": "it should be a text of another form, not empty",
}


class Form(BaseModel):
    """JSON object with strict types: numbers are finite, and no truth value or text is a whole number.

    Unknown keys are allowed.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow", protected_namespaces=())


def checked(form: type[BaseModel], data: Any, path: object, hint: str = AGAIN, wrong: str = "is damaged") -> Any:
    """Check data against a form, and return them unchanged.

    Args:
        form: the expected form.
        data: the data that were read.
        path: their file, for the message.
        hint: what the message says to do about an error.
        wrong: what the message says about the file.

    Raises:
        DiffesError: the data do not match; the message names the first wrong place and what is expected there.
    """
    try:
        form.model_validate(data)
    except ValidationError as error:
        raise DiffesError(f"{path} {wrong} ({_said(error)}); {hint}") from None
    return data


def parsed(form: TypeAdapter[Any], data: Any, place: object, hint: str = AGAIN, wrong: str = "is damaged") -> Any:
    """Return the object that JSON data describe; see `checked`. Types are strict.

    Raises:
        DiffesError: the data do not match; the message names the first wrong place and what is expected there.
    """
    try:
        return form.validate_json(to_json(data), strict=True)
    except (ValidationError, PydanticSerializationError) as error:
        said = _said(error) if isinstance(error, ValidationError) else str(error)
        raise DiffesError(f"{place} {wrong} ({said}); {hint}") from None


def _said(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(_places(first["loc"]))
    if first["type"] == "missing":
        return f"it lacks {place}"
    wanted = TOLD.get(first["type"], first["msg"].replace("Input should", "it should"))
    return f"{place + ': ' if place else ''}{wanted}, got {reprlib.repr(first['input'])}"


def _places(loc: tuple[int | str, ...]) -> Iterator[str]:
    return (reprlib.repr(part)[1:-1] if isinstance(part, str) else str(part) for part in loc)


class LayerSplit(Form):
    """Split of the levels over the layers (see `diffes.pruning.bank.split_of`)."""

    sets: list[Text]
    groups: list[Count]
    kept: dict[Text, list[Count]]


class Pruned(Form):
    """Facts about a bank: its method, model, stages and levels."""

    method: Text
    allocation: Literal["sensitivity", "damage", "equal"] = "equal"
    kind: Text
    model: Text
    stages: Annotated[list[Range], Field(min_length=1)]
    max_level: Number
    split: LayerSplit | None = None


class StageEntry(Form):
    """Entry of a stage at a level: for each set, the place of its tensors, and the number of groups that stay."""

    stage: Count
    level: Number
    sets: dict[Text, Annotated[list[Text | Count], Field(min_length=2, max_length=2)]]


class StageFile(Form):
    """Calibrated stage, `calibration/stageN.json`."""

    kind: Text
    max_level: Number
    calls: Count
    entries: list[StageEntry]
    sha256: Digest
    checksum: Digest


class Artifact(Pruned):
    """Fields that `schedule.json` and `front.json` share."""

    format_version: Number
    guidance: Amount
    guidance_range: Annotated[list[Amount], Field(min_length=2, max_length=2)] | None = None
    dtype: Literal["float32", "float16", "bfloat16"]
    bank_sha256: Digest
    checksum: Digest


class ScheduleFile(Artifact):
    """`schedule.json`."""

    levels: list[Count]
    steps: Number
    nominal_sparsity: Fraction
    macs_fraction: Amount


class End(Form):
    """Held-out error of a plan at an end of a range of guidance."""

    guidance: Amount
    latent_mse: Amount | None
    latent_interval: Annotated[list[Amount], Field(min_length=2, max_length=2)] | None = None


class FrontPoint(Form):
    """Plan of a front."""

    kind: Text
    budget: Positive
    cost: Positive
    n_calls: Number
    heldout_mean: float | None
    heldout_std: float | None
    latent_mse: Amount | None
    timesteps: Annotated[list[Count], Field(min_length=1)]
    sigmas: list[Amount]
    levels: Annotated[list[Count], Field(min_length=1)]
    calls_spent: Count
    ms: Positive
    solver: Text = "dpmsolver++"  # this and the following fields: since format 2
    coefficients: Coefficients | None = None
    fit_mean: float | None = None
    latent_median: Amount | None = None
    latent_interval: Annotated[list[Amount], Field(min_length=2, max_length=2)] | None = None
    image_mse: Amount | None = None
    image_mse_error: Amount | None = None
    ssim: float | None = None
    ssim_error: Amount | None = None
    variance: Amount | None = None
    ends: list[End] | None = None


class Reference(Form):
    """Reference that plans are compared with."""

    solver: Text
    steps: Number
    spacing: Text = "trailing"
    final_sigma: Amount = 0.0


class FrontFile(Artifact):
    """`front.json`."""

    reference: Reference
    solver: Text
    currency: Text
    metric: Text
    nodes: Number
    prediction_type: Text = "epsilon"
    search_probes: Number = 1
    fit_probes: Number = 1
    heldout: Number = 1
    timing: dict[Text, Number | Text] = {}
    points: Annotated[list[FrontPoint], Field(min_length=1)]


class Fingerprint(Form):
    """Fingerprint that identifies a denoiser."""

    structure: Digest
    sample: list[float]


class BankHeader(Form):
    """Metadata of a bank. Fields that older versions lack have defaults."""

    format_version: Number
    kind: Text
    method: Text = "?"
    max_level: Count = 0
    stages: list[Range] = []
    split: LayerSplit | None = None
    same: dict[Text, Text] = {}
    fingerprint: Fingerprint | None = None


class HeldOutScore(Form):
    """Measurements of a candidate on held-out probes."""

    heldout_mean: float | None
    heldout_std: float | None = None


class Scores(HeldOutScore):
    search: float | None
    n_heldout: Number


class Uniform(HeldOutScore):
    levels: list[Count]
    search: float | None
    nominal_sparsity: Fraction
    macs_fraction: Amount


class FewerSteps(HeldOutScore):
    steps: Number
    macs_fraction: Amount


class Baselines(Form):
    uniform: Uniform
    fewer_steps: FewerSteps


class Latency(Form):
    routed_ms: Positive
    uniform_ms: Positive
    fewer_steps_ms: Positive
    dense_ms: Positive
    batch: Number
    repeats: Number
    device: Text
    threads: Number


class ReportPoint(Form):
    steps: Number = 1
    levels: list[Count] = []
    heldout_mean: float | None
    macs_fraction: Amount
    search: float | None = None


class ReportFile(Form):
    """`report.json`."""

    model: Text
    method: Text
    metric: Text
    strategy: Text
    seed: Count
    levels: list[Count]
    nominal_sparsity: Fraction
    prunable_fraction: Fraction
    macs_fraction: Amount
    evaluations: Number
    denoiser_calls: Count
    paid_calls: Count | None = None
    search_seconds: Amount
    calibration_calls: Count = 0
    fitness: Scores
    baselines: Baselines
    latency: Latency
    front: dict[Text, list[ReportPoint]] = {}
    bank_bytes: Count


class CostsFile(Form):
    """`costs.json` of a run. Older versions wrote no checksum."""

    cost: Text
    costs: CostTable
    checksum: Digest | None = None


class CellCosts(RootModel[dict[Text, CostTable]]):
    """`costs.json` of many cells, by the digest of their settings."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ConfigFile(Form):
    """`config.json`; the settings themselves are checked against their own types."""

    settings: dict[Text, Any]
    versions: dict[Text, Text]


class Prompts(Form):
    """File of prompts."""

    search: Annotated[list[Prompt], Field(min_length=1)]
    heldout: Annotated[list[Prompt], Field(min_length=1)]
    calibration: list[Prompt] = []


class Paid(Form):
    """Facts about an evaluation that a trial of a study holds beside levels and fitness."""

    denoiser_calls: Count
    seconds: Amount
    fidelity: Annotated[float, Field(gt=0, le=1)] = 1.0
    coefficients: Coefficients | None = None
    digest: Digest | None = None
    worker: str | None = None
    waited: Amount = 0.0
    paid_calls: Count = 0
