"""GenEval and VBench are given what they read and asked as they are asked, by stand-ins of their published interfaces;
nothing that they would fetch is left for them to fetch."""

import hashlib
import json
import sys

import numpy as np
import pytest
from PIL import Image

from dit2deploy.base.errors import Misuse
from dit2deploy.stages.evaluate.metrics import METRICS, geneval, vbench
from dit2deploy.stages.evaluate.metrics.pairs import Pairs

# As evaluation/evaluate_images.py reads and writes; an image is right where it is bright.
EVALUATE_IMAGES = """
import json, os, sys
from PIL import Image
folder, outfile, weights = sys.argv[1], sys.argv[sys.argv.index("--outfile") + 1], sys.argv[-1]
assert sys.argv[-2] == "--model-path" and os.environ["https_proxy"] == "http://127.0.0.1:9"
with open(outfile, "w") as out:
    for name in sorted(os.listdir(folder)):
        metadata = json.load(open(os.path.join(folder, name, "metadata.jsonl")))
        for image in sorted(os.listdir(os.path.join(folder, name, "samples"))):
            pixel = Image.open(os.path.join(folder, name, "samples", image)).getpixel((0, 0))
            entry = {"tag": metadata["tag"], "correct": pixel[0] > 127, "prompt": metadata["prompt"]}
            out.write(json.dumps(entry) + "\\n")
"""
# As vbench.VBench of 0.1.5; the score of a video is the red of its first pixel.
VBENCH = """
import json, os, pathlib
class VBench:
    def __init__(self, device, full_info_dir, output_path):
        assert device == "cpu"
        self.output_path = output_path
    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, mode="vbench_standard"):
        assert local and mode == "custom_input" and os.environ["https_proxy"]
        videos = sorted(pathlib.Path(videos_path).glob("*.mp4"))
        assert [video.name for video in videos] == sorted(prompt_list)
        found = [{"video_path": str(video), "video_results": video.read_bytes()[0] / 255} for video in videos]
        mean = sum(video["video_results"] for video in found) / len(found)
        path = os.path.join(self.output_path, name + "_eval_results.json")
        json.dump({dimension_list[0]: [mean, found]}, open(path, "w"))
"""
CV2 = """
import numpy as np
def VideoWriter_fourcc(*letters):
    return letters
class VideoWriter:
    def __init__(self, path, fourcc, fps, size):
        self.file, self.size = open(path, "wb"), size
    def write(self, frame):
        assert frame.shape[1::-1] == self.size and frame.flags.c_contiguous
        self.file.write(frame[..., ::-1].tobytes())
    def release(self):
        self.file.close()
"""
TORCH = """
class cuda:
    is_available = staticmethod(lambda: False)
"""
METADATA = [{"tag": tag, "include": [], "prompt": prompt} for tag, prompt in (("one", "a cat"), ("two", "a dog"))]


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """put(**sources): modules that the evaluators' interpreter finds first, and its only home."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("VBENCH_CACHE_DIR", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def put(**sources: str) -> None:
        for name, source in sources.items():
            (folder / f"{name}.py").write_text(source)

    return put


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "geneval"
    for path, content in (
        (geneval.METADATA, "".join(f"{json.dumps(entry)}\n" for entry in METADATA)),
        (geneval.EVALUATOR, EVALUATE_IMAGES),
    ):
        (root / path).parent.mkdir(parents=True)
        (root / path).write_text(content)
    return root


def images(*reds: float) -> np.ndarray:
    made = np.zeros((len(reds), 4, 6, 3), np.float32)
    made[..., 0] = np.reshape(reds, (-1, 1, 1))
    return made


@pytest.fixture
def pairs(tmp_path, repository):
    drawn = {"engine": images(1, 0, 1), "full_precision": images(1, 1, 1)}
    prompts = ("a dog", "a dog", "a cat")
    return Pairs.of(drawn, prompts, samples=tmp_path / "samples", geneval=repository, python=None)


def changed(pairs: Pairs, **fields) -> Pairs:
    return Pairs(**{**vars(pairs), **fields})


def test_geneval_reads_its_layout_and_its_results_are_scores(pairs, modules, repository, tmp_path, monkeypatch):
    with pytest.raises(Misuse, match=f"{geneval.DETECTOR}: no such file") as caught:
        geneval.measure(pairs)
    assert "Download https://download.openmmlab.com" in caught.value.cure
    (repository / geneval.DETECTOR).write_bytes(b"weights")
    clip = tmp_path / "home" / ".cache" / "clip" / "ViT-L-14.pt"
    clip.parent.mkdir(parents=True)
    clip.write_bytes(b"another file")
    with pytest.raises(Misuse, match=r"ViT-L-14.pt: is not the published file"):
        geneval.measure(pairs)
    monkeypatch.setattr(geneval, "_CLIP_SHA256", hashlib.sha256(b"another file").hexdigest())
    modules(torch=TORCH, open_clip="", clip_benchmark="", pandas="")
    with pytest.raises(Misuse, match=r"cannot import .*No module named 'mmdet'") as caught:
        geneval.measure(pairs)
    assert "--evaluators" in caught.value.cure
    modules(mmdet="")

    found = geneval.measure(pairs)
    # Two dogs, one of them dark, and a bright cat: (1 / 2 + 1) / 2 of the engine.
    assert found["tasks"] == {"engine": {"one": 1, "two": 0.5}, "full_precision": {"one": 1, "two": 1}}
    assert (found["engine"], found["full_precision"], found["images"]) == (0.75, 1, 3)
    made = sorted(path.relative_to(pairs.samples).as_posix() for path in pairs.samples.rglob("engine/*/*/*"))
    assert made == [
        f"geneval/engine/0000{name}" for name in ("0/samples/0000.png", "1/samples/0000.png", "1/samples/0001.png")
    ]
    assert json.loads((pairs.samples / "geneval/engine/00001/metadata.jsonl").read_text()) == METADATA[1]
    assert Image.open(pairs.samples / made[2]).getpixel((5, 3)) == (0, 0, 0)


def test_geneval_says_what_is_missing_or_broken(pairs, modules, repository, tmp_path):
    with pytest.raises(Misuse, match="no folder of GenEval") as caught:
        geneval.measure(changed(pairs, geneval=None))
    assert "git clone" in caught.value.cure
    with pytest.raises(Misuse, match=r"cannot be read.*evaluation_metadata"):
        geneval.measure(changed(pairs, geneval=tmp_path))
    with pytest.raises(Misuse, match="2 prompts are none of GenEval's, the first: 'a bird'"):
        geneval.measure(changed(pairs, prompts=("a bird", "a cat", "a fox")))
    results = tmp_path / "results.jsonl"
    for content in ("", "[]", '{"tag": "one"}'):
        results.write_text(content)
        with pytest.raises(Misuse, match="GenEval's evaluator"):
            geneval.tasks_of(results)


def test_vbench_measures_mp4_of_the_frames(pairs, modules, tmp_path, monkeypatch):
    videos = {who: image[:, None].repeat(3, axis=1) for who, image in (("engine", images(0.2, 0.6)),)}
    videos["full_precision"] = images(1, 1)[:, None].repeat(3, axis=1)
    pairs = Pairs.of(videos, ("a cat", "a dog"), samples=tmp_path / "samples")
    modules(torch=TORCH, cv2=CV2)
    with pytest.raises(Misuse, match=r"cannot import .*No module named 'vbench'"):
        vbench.measure(pairs, dimension="motion_smoothness")
    modules(vbench=VBENCH)
    with pytest.raises(Misuse, match=r"\.cache/vbench/amt_model/amt-s.pth: no such file") as caught:
        vbench.measure(pairs, dimension="motion_smoothness")
    assert "Download https://huggingface.co/lalala125/AMT" in caught.value.cure
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "cache"))
    for names in vbench.FILES.values():
        for name in names:
            (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cache" / name).write_bytes(b"")
    found = {name: vbench.measure(pairs, dimension=name) for name in ("motion_smoothness", "imaging_quality")}
    for scores in found.values():
        assert scores == {"engine": pytest.approx((51 + 153) / 2 / 255), "full_precision": 1}
    video = (tmp_path / "samples/vbench/engine/00001.mp4").read_bytes()
    assert len(video) == 3 * 4 * 6 * 3 and set(video) == {153, 0}
    with pytest.raises(Misuse, match=r"hub/checkpoints/dino_vitbase16_pretrain.pth: no such file"):
        vbench.measure(pairs, dimension="subject_consistency")
    modules(vbench=VBENCH.replace("assert local", "raise RuntimeError('out of memory')\n        assert local"))
    with pytest.raises(Misuse, match="VBench's imaging_quality failed: RuntimeError: out of memory"):
        vbench.measure(pairs, dimension="imaging_quality")


def test_images_have_geneval_and_videos_vbench():
    kinds = {metric.name: metric.of for metric in METRICS}
    assert kinds["geneval"] == "images" and kinds["psnr_db"] == "all"
    assert [name for name, kind in kinds.items() if kind == "videos"] == [f"vbench_{name}" for name in vbench.FILES]


def test_an_interpreter_that_is_missing_is_told(pairs, tmp_path):
    from dit2deploy.stages.evaluate.metrics.evaluator import require_modules

    with pytest.raises(Misuse, match="nowhere cannot import json: No such file"):
        require_modules(tmp_path / "nowhere", ["json"], install="Install it.")
    require_modules(pairs.python, ["json"], install="")
    assert str(pairs.python) == sys.executable
