"""What a run is evaluated on: one section a suite, each optional, and the judge that some of them need."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from sima_ray.config.base import Location, Section
from sima_ray.config.origins import read_url

SuiteName = Literal["chair", "pope", "amber", "halbench", "mmhal", "mementos"]
"""The suites, in the order in which they run."""

AmberPart = Literal["generative", "existence", "attribute", "relation"]


def _api(text: str) -> str:
    """An API's base URL, without the slash at its end."""
    try:
        address = read_url(text)
    except ValueError as error:
        raise ValueError(
            f"{text!r} is no base URL ({error}): write https://api.example.org/v1"
        ) from error
    if "?" in address.target or "#" in text:
        raise ValueError(f"{text!r}: a base URL has neither a query nor a fragment")
    return (address.origin + address.target).rstrip("/")


class JudgeConfig(Section):
    """The judge of `mmhal` and `mementos`: any endpoint that speaks OpenAI's chat completions."""

    base_url: Annotated[str, AfterValidator(_api)] = Field(
        description="As in https://api.example.org/v1; its chat/completions is asked."
    )
    model: str = Field(min_length=1)
    key_env: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable that holds the key where the job runs.",
    )
    key_file: Location | None = Field(
        default=None, description="File that holds the key and nothing else."
    )
    concurrency: int = Field(default=4, ge=1, description="Questions in flight at once.")
    max_tokens: int = Field(default=1024, ge=16)
    temperature: float | None = Field(
        default=0.0, ge=0, le=2, description="null: not sent, for models that refuse it."
    )
    timeout_s: float = Field(default=120.0, gt=0, description="Of one try.")
    attempts: int = Field(
        default=6,
        ge=1,
        description="Tries of one question, for timeouts, broken connections, 429 and 5xx; waits between them "
        "double, and are longer where Retry-After asks for it.",
    )
    first_wait_s: float = Field(default=1.0, ge=0)
    longest_wait_s: float = Field(default=60.0, ge=0)
    give_up_s: float = Field(
        default=1800.0, gt=0, description="Of one question, all its tries and waits."
    )
    readings: int = Field(
        default=2, ge=1, description="Times that a question is asked whose answer cannot be read."
    )
    max_failed_share: float = Field(
        default=0.02, ge=0, lt=1, description="With more questions unjudged the suite fails."
    )
    price_in: float | None = Field(
        default=None, ge=0, description="Of a million prompt tokens, in any currency."
    )
    price_out: float | None = Field(default=None, ge=0, description="Of a million answer tokens.")
    cache: Location | None = Field(
        default=None, description="Folder of the judge's answers; None: `judge` in the run's."
    )

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.key_env is not None and self.key_file is not None:
            raise ValueError("key_env and key_file: give one of the two")
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("price_in and price_out go together")
        return self


class AmberConfig(Section):
    """AMBER: captions against annotated objects, and yes/no questions."""

    data: Location = Field(
        description="Its `data` folder: annotations.json, relation.json, safe_words.txt, query/."
    )
    images: Location
    parts: list[AmberPart] = Field(
        default=["generative", "existence", "attribute", "relation"], min_length=1
    )
    limit: int | None = Field(default=None, ge=1, description="The first N questions of each part.")
    max_tokens: int = Field(default=512, ge=1)
    suffix: str = Field(
        default="", description="Added to each yes/no question, as in ' Answer yes or no.'"
    )
    similar: Location | None = Field(
        default=None,
        description="JSON, word: [words]: pairs of AMBER's words that count as one, in place of the "
        "reference's word vectors; None: only equal words do.",
    )


class HalBenchConfig(Section):
    """Object HalBench, scored by rules: detailed descriptions of 300 COCO images."""

    questions: Location = Field(description="obj_halbench_300_with_image.jsonl.")
    images: Location | None = Field(
        default=None, description="COCO's images; None: those inside the file of questions."
    )
    instances: Location | None = Field(
        default=None, description="COCO instances JSON; None: evaluation.instances."
    )
    captions: Location | None = Field(
        default=None,
        description="COCO captions JSON, of the same images; None: evaluation.captions, also beside instances of "
        "its own.",
    )
    synonyms: Location | None = Field(
        default=None, description="As chair_synonyms, for this suite; None: chair_synonyms."
    )
    limit: int | None = Field(default=None, ge=1)
    max_tokens: int = Field(default=512, ge=1)


class MMHalConfig(Section):
    """MMHal-Bench: 96 open questions of 8 types, rated by a judge."""

    questions: Location = Field(description="response_template.json.")
    images: Location = Field(description="Named as in image_src, or by image_id.")
    limit: int | None = Field(default=None, ge=1)
    max_tokens: int = Field(default=512, ge=1)


class MementosConfig(Section):
    """Mementos: sequences of images told, their objects and behaviours compared by a judge."""

    descriptions: list[Location] = Field(
        min_length=1, description="dl_description.csv, robo_description.csv, cmc_description.csv."
    )
    images: Location
    limit: int | None = Field(default=None, ge=1, description="The first N of each file.")
    max_tokens: int = Field(default=512, ge=1)
    prompt: str = Field(
        default="These images, in order, are one episode. Tell what happens in it, in one paragraph.",
        min_length=1,
        description="What the policy is asked.",
    )


class EvaluationConfig(Section):
    """Captions of held-out images against COCO annotations (CHAIR), POPE, and further benchmarks.

    CHAIR runs where prompts, images and instances are given.
    """

    prompts: Location | None = None
    images: Location | None = Field(default=None, description="Of CHAIR and POPE.")
    instances: Location | None = Field(default=None, description="COCO instances JSON.")
    captions: Location | None = Field(
        default=None, description="COCO captions JSON, as CHAIR uses it."
    )
    chair_synonyms: Location | None = Field(
        default=None,
        description="Names of COCO's categories, in the format of the reference's synonyms.txt or as YAML; "
        "None: our own list.",
    )
    limit: int | None = Field(default=None, ge=1)
    max_tokens: int = Field(default=512, ge=1)
    pope: list[Location] = Field(default_factory=list, description="POPE files, JSON lines.")
    pope_rule: Literal["first_sentence", "published", "exact"] = Field(
        default="first_sentence",
        description="How answers are read; published: as POPE's own script, exact: as lmms-eval.",
    )
    amber: AmberConfig | None = None
    halbench: HalBenchConfig | None = None
    mmhal: MMHalConfig | None = None
    mementos: MementosConfig | None = None
    judge: JudgeConfig | None = None
    every_round: list[SuiteName] | None = Field(
        default=None,
        description="Suites that the pipeline runs on every policy; None: all. `sima evaluate` runs any.",
    )
    error_counter: str | None = Field(
        default=None,
        description="'module:function' that counts a response's errors against its ground truth, "
        "where such a count exists (the demo's world).",
    )
    bootstrap_samples: int = Field(default=2000, ge=100)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)

    @property
    def suites(self) -> tuple[SuiteName, ...]:
        """The suites that this section has files for, in the order in which they run."""
        has: dict[SuiteName, object] = {
            "chair": self.instances,
            "pope": self.pope,
            "amber": self.amber,
            "halbench": self.halbench,
            "mmhal": self.mmhal,
            "mementos": self.mementos,
        }
        return tuple(name for name, given in has.items() if given)

    @property
    def suites_of_rounds(self) -> tuple[SuiteName, ...]:
        """Those of them that the pipeline runs."""
        wanted = self.suites if self.every_round is None else self.every_round
        return tuple(name for name in self.suites if name in wanted)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        chair = {"prompts": self.prompts, "instances": self.instances}
        if any(chair.values()):
            chair["images"] = self.images
            if missing := [name for name, value in chair.items() if value is None]:
                raise ValueError(
                    f"prompts, images and instances go together: {', '.join(missing)} missing"
                )
        if self.pope and self.images is None:
            raise ValueError("pope needs images")
        if not self.suites:
            raise ValueError(
                "nothing to evaluate: give prompts, images and instances (CHAIR), pope, amber, halbench, "
                "mmhal or mementos"
            )
        if self.halbench and not (self.halbench.instances or self.instances):
            raise ValueError("halbench needs instances, of its own or CHAIR's")
        if self.judge is None and (self.mmhal or self.mementos):
            raise ValueError("mmhal and mementos need a judge section")
        if unknown := [name for name in self.every_round or () if name not in self.suites]:
            raise ValueError(f"every_round: {', '.join(unknown)} has no files here")
        return self
