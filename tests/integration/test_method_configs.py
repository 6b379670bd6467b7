"""The configs of the published methods: one per method, and they build what they say."""

import pytest

from kd_det import terms
from kd_det.config import student_config
from kd_det.paths import CONFIGS
from kd_det.registry import TERMS
from tests.integration.test_configs import levels_of, load, on_meta

P3_P6 = ["p3", "p4", "p5", "p6"]
P3_P7 = [*P3_P6, "p7"]
# Name: (term, its class, weight, levels, connector and region of the plan, millions of parameters).
PLANS = {
    "at": ("at", terms.AT, 1000.0, P3_P7, "-", "Padding", 0),
    "channel_distillation": (
        "channels", terms.ChannelDistillation, 6.0, P3_P7, "conv1x1+BN+ReLU", "Padding", 0.330,
    ),
    "fgfi": ("fgfi", terms.FGFI, 0.01, P3_P7, "conv3x3+ReLU", "AnchorIoU", 2.950),
    "fitnet": ("hint", terms.FitNet, 1.0, P3_P7, "conv1x1", "Padding", 0.329),
    "fkd": ("fkd", terms.FKD, 1.0, P3_P7, "conv1x1", "Attention", 1.646),
    "logit_box": ("predictions", terms.LogitBoxKD, 1.0, P3_P7, "-", "Padding", 0),
    "pi": ("pi", terms.PI, 10.0, P3_P7, "-", "Padding", 0),
    "pi_sigmoid": ("pi", terms.PI, 1.0, P3_P7, "-", "Padding", 0),
    "pkd": ("pkd", terms.PKD, 10.0, P3_P6, "-", "Padding", 0),
}  # fmt: skip

# Of networks that learn together, by term: (learner, source).
DML = {"from_peer": ("student", "peer"), "from_student": ("peer", "student")}
OKDCR = {
    "intra_student": ("student", "student_2"), "intra_peer": ("peer", "peer_2"),
    "inter_1": ("student", "peer"), "inter_2": ("student_2", "peer_2"),
    **{f"ensemble_{x}": (x, "ensemble") for x in ("student", "student_2", "peer", "peer_2")},
}  # fmt: skip


def test_every_method_has_its_file_and_every_file_its_method() -> None:
    files = {p.name for p in (CONFIGS / "KD").glob("*_R_101.yaml") if "cwd" not in p.name}
    assert files == {f"{name}_R_101.yaml" for name in PLANS} | {"teacher_R_101.yaml"}
    ours = {
        cls for _, cls in TERMS
        if issubclass(cls, terms.LevelwiseTerm) and cls.__module__.startswith("kd_det.terms.")
    }  # fmt: skip
    mutual = {cls for cls in ours if cls.moves_target}  # of peers, not of a teacher
    assert {plan[1] for plan in PLANS.values()} == ours - mutual - {terms.CWD}


@pytest.mark.parametrize("name", PLANS)
def test_a_method_builds_as_it_says(name: str) -> None:
    file = f"COCO-Detection/retinanet_R_50_FPN_1x_{name}_R_101.yaml"
    term, cls, weight, levels, connector, region, parameters = PLANS[name]
    cfg = load(file)
    assert load(f"KD/{name}_R_101.yaml").KD == cfg.KD
    assert student_config(cfg) == student_config(load("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    assert cfg.KD.SOURCES == load("KD/cwd_R_101.yaml").KD.SOURCES
    model = on_meta(file)
    assert levels_of(model) == {term: levels}
    built = model.terms[term]
    assert type(built) is cls
    assert built.weight == weight
    row = model.wiring.rows[term][0]
    assert (row.connector, row.region) == (connector, region)
    found = sum(p.numel() for p in model.terms.parameters())
    assert found / 1e6 == pytest.approx(parameters, abs=1e-3)


@pytest.mark.parametrize("name", ["fgfi", "fkd", "fitnet", "logit_box", "channel_distillation"])
def test_what_a_file_spells_out_is_the_default_of_its_type(name: str) -> None:
    item = load(f"KD/{name}_R_101.yaml").KD.TERMS
    ((term, written),) = item.items()
    cfg = load("KD/teacher_R_101.yaml")
    cfg.merge_from_list([f"KD.TERMS.{term}", {"TYPE": written.TYPE, "WEIGHT": written.WEIGHT}])
    assert cfg.KD.TERMS[term] == written


@pytest.mark.parametrize(("name", "millions"), [("ema", 0), ("frskd", 8.68)])
def test_a_student_without_a_trained_teacher_builds_as_its_file_says(
    name: str, millions: float
) -> None:
    file = f"COCO-Detection/retinanet_R_50_FPN_1x_{name}.yaml"
    cfg = load(file)
    assert load(f"KD/{name}.yaml").KD == cfg.KD
    assert student_config(cfg) == student_config(load("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    model = on_meta(file)
    levels = levels_of(model)
    assert levels["logits"] == P3_P7
    assert levels.get("fpn", P3_P7) == P3_P7
    found = sum(p.numel() for p in model.sources.parameters())
    assert found / 1e6 == pytest.approx(millions, abs=0.1)
    toy = load(f"quickstart/{name}.yaml")
    assert student_config(toy) == student_config(load("quickstart/student.yaml"))
    assert toy.KD.TERMS.LOGITS == cfg.KD.TERMS.LOGITS


@pytest.mark.parametrize(
    ("name", "pairs", "millions"),
    [
        ("dml", DML, 38.0),
        ("dml_R_18", DML, 21.4),
        ("okdcr", OKDCR, 50.8),
        ("okdcr_R_18", OKDCR, 34.3),
    ],
)
def test_networks_that_learn_together_build_as_their_file_says(
    name: str, pairs: dict[str, tuple[str, str]], millions: float
) -> None:
    file = f"COCO-Detection/retinanet_R_50_FPN_1x_{name}.yaml"
    cfg = load(file)
    assert load(f"KD/{name}.yaml").KD == cfg.KD
    assert student_config(cfg) == student_config(load("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    model = on_meta(file)
    assert levels_of(model) == dict.fromkeys(pairs, P3_P7)
    of = model.wiring
    assert {t: (of.learner_of[t], of.source_of[t]) for t in of.terms} == pairs
    assert list(of.networks) == ["student", "peer"]
    assert all(t.schedule(0.8, 90000) == 1 for t in of.terms.values())
    found = sum(p.numel() for p in model.sources.parameters())
    assert found / 1e6 == pytest.approx(millions, abs=0.1)
