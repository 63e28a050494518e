"""A random DiT of DiT-XL/2's geometry, and what each engine makes of it: folders that are made once and kept."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blocks.folded import write_folded

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.onnx_model import OnnxModel
from dit2deploy.artefacts.policy import Weight
from dit2deploy.base.files import whole_folder, write_json

GEOMETRY = {  # of DiT-XL/2 for images of 256 x 256
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
TOKENS = (GEOMETRY["sample_size"] // GEOMETRY["patch_size"]) ** 2  # a sample
RANK = 16
GROUP = 128  # weights that share a scale in the 4-bit baselines: it divides 1152
CALIBRATION_CALLS = 8


@dataclass(frozen=True)
class Own:
    """A recipe of ours: its name for `search`, whether it has a low-rank branch of rank RANK, and the weight format of
    the modulation linears (None: the recipe's; ternary, as RobuQ has it, makes smaller files and worse pictures)."""

    recipe: str
    branch: bool = False
    modulation: Weight | None = None


OWN = {
    "ternary A4": Own("w1.58a4"),
    "ternary A4, rank 16": Own("w1.58a4", branch=True),
    "ternary A4, ternary modulation": Own("w1.58a4", modulation="ternary"),
    "ternary A4, rank 16, ternary modulation": Own("w1.58a4", branch=True, modulation="ternary"),
    "ternary A8": Own("w1.58a8"),
    "W3A3": Own("w3a3"),
    "W4A4": Own("w4a4"),
    "W4A8": Own("w4a8"),
    "W8A8": Own("w8a8"),
}


def inputs(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """One step of `batch` samples: latents of unit variance, timesteps, class labels."""
    rng = np.random.default_rng(seed)
    size = GEOMETRY["sample_size"]
    return {
        "hidden_states": rng.standard_normal((batch, GEOMETRY["in_channels"], size, size), np.float32),
        "timestep": rng.integers(0, 1000, batch),
        "class_labels": rng.integers(0, GEOMETRY["num_embeds_ada_norm"], batch),
    }


def macs(blocks: int, batch: int) -> int:
    """Multiply-accumulates of the linears and the attention's products of all blocks."""
    k, m = GEOMETRY["num_attention_heads"] * GEOMETRY["attention_head_dim"], TOKENS * batch
    return blocks * (12 * k * k * m + 2 * TOKENS * m * k + 6 * k * k * batch)


class Made:
    """The folder of one depth; each member is made when it is first asked for."""

    def __init__(self, root: Path, blocks: int) -> None:
        self.root, self.blocks = root / f"dit-xl-{blocks}", blocks
        self.root.mkdir(parents=True, exist_ok=True)

    def pipeline(self) -> Path:
        return self._folder("pipeline", self._write_pipeline)

    def float_onnx(self) -> Path:
        """Path of the float ONNX model's file."""
        from dit2deploy.stages.export import export_float

        out = self.root / "float"
        if not out.exists():
            export_float(self.pipeline(), out)
        return OnnxModel.load(out).path

    def rivals_onnx(self) -> Path:
        return self._model("rivals", lambda path: write_folded(self.float_onnx(), path))

    def bundle(self, own: Own) -> Path:
        """The ort-cpu bundle of a recipe, weights rounded to nearest: that is as fast as any other rounding."""
        from dit2deploy.artefacts.policy import Policy
        from dit2deploy.stages.build import build
        from dit2deploy.stages.export import export
        from dit2deploy.stages.quantize import quantize
        from dit2deploy.stages.search import search

        name = own.recipe + ("-branch" if own.branch else "") + (f"-{own.modulation}" if own.modulation else "")
        out, work = self.root / name, self.root / f"{name}.work"
        if out.exists():
            return out
        options = {"low_rank": RANK if own.branch else 0, "rounding": "nearest", "branch_init": "weight"}
        options |= {"modulation": own.modulation} if own.modulation else {}
        search(self.pipeline(), work / "policy.json", recipe=own.recipe, **options)
        policy = Policy.load(work / "policy.json")
        if not (work / "checkpoint").exists():
            quantize(self.pipeline(), policy, self._calibration(), work / "checkpoint")
        if not (work / "onnx").exists():
            export(work / "checkpoint", work / "onnx")
        build(work / "onnx", out, targets=["ort-cpu"], model=self.pipeline())
        return out

    def ort_int8(self) -> Path:
        """What `quantize_dynamic` makes of the float model."""
        from onnxruntime.quantization import QuantType, quantize_dynamic

        def write(path: Path) -> None:
            logging.disable(logging.WARNING)
            quantize_dynamic(self.rivals_onnx(), path, weight_type=QuantType.QInt8, use_external_data_format=True)

        return self._model("ort-int8", write)

    def ort_int4(self) -> Path:
        """MatMulNBits of 4 bits with int8 arithmetic."""
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        def write(path: Path) -> None:
            model = onnx.load(self.rivals_onnx())
            made = MatMulNBitsQuantizer(model, bits=4, block_size=GROUP, is_symmetric=True, accuracy_level=4)
            made.process()
            made.model.save_model_to_file(str(path), True)

        return self._model("ort-int4", write)

    def openvino_int8(self) -> Path:
        """NNCF's static quantization; without SmoothQuant, which spoils inputs that it was not calibrated on."""
        import nncf
        import openvino
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters

        def write(path: Path) -> None:
            calls = nncf.Dataset([inputs(2, seed=100 + i) for i in range(CALIBRATION_CALLS)])
            alphas = AdvancedSmoothQuantParameters(matmul=-1)
            model = nncf.quantize(
                openvino.Core().read_model(self.rivals_onnx()),
                calls,
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=CALIBRATION_CALLS,
                advanced_parameters=AdvancedQuantizationParameters(smooth_quant_alphas=alphas),
            )
            openvino.save_model(model, path, compress_to_fp16=False)

        return self._model("openvino-int8", write, "model.xml")

    def openvino_int4(self) -> Path:
        """NNCF's weight compression to 4 bits; activations are quantized at run time, to int8."""
        import nncf
        import openvino

        def write(path: Path) -> None:
            model = nncf.compress_weights(
                openvino.Core().read_model(self.rivals_onnx()),
                mode=nncf.CompressWeightsMode.INT4_SYM,
                group_size=GROUP,
                ratio=1.0,
                all_layers=True,
            )
            openvino.save_model(model, path, compress_to_fp16=False)

        return self._model("openvino-int4", write, "model.xml")

    def _write_pipeline(self, folder: Path) -> None:
        import torch
        from diffusers import DiTTransformer2DModel

        torch.manual_seed(0)
        model = DiTTransformer2DModel(num_layers=self.blocks, **GEOMETRY)
        embedder = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks:  # the original has one; converted checkpoints hold it once a block
            block.norm1.emb.load_state_dict(embedder)
        model.save_pretrained(folder / "transformer")
        write_json(folder / "model_index.json", {"_class_name": "DiTPipeline"})
        scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "clip_sample": False}
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)

    def _calibration(self) -> CalibrationSet:
        from dit2deploy.stages.calibrate import calibrate

        out = self.root / "calibration"
        if not out.exists():
            calibrate(self.pipeline(), out, samples=1, steps=1)
        return CalibrationSet.load(out)

    def _model(self, name: str, write: Callable[[Path], Any], file: str = "model.onnx") -> Path:
        return self._folder(name, lambda folder: write(folder / file)) / file

    def _folder(self, name: str, write: Callable[[Path], Any]) -> Path:
        out = self.root / name
        if not out.exists():
            with whole_folder(out) as folder:
                write(folder)
        return out
