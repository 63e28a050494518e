"""Runs in the environment of vbench, which may lack dit2deploy: frames to mp4, and one dimension of VBench over them.

A JSON job on stdin: {"videos": folder, "dimension", "prompts": {"00000.mp4": prompt, ..}}. Of each folder WHO of videos
it reads WHO/NNNNN.npy, uint8 [F, H, W, 3], and VBench writes WHO-DIMENSION_eval_results.json beside the folder.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np

FRAMES_PER_SECOND = 16  # Wan2.1's


def main() -> None:
    # Python puts the script's folder first: its modules have the names of packages (vbench.py).
    here = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != here]
    job = json.load(sys.stdin)
    folder, dimension = Path(job["videos"]), job["dimension"]
    device = "cuda" if importlib.import_module("torch").cuda.is_available() else "cpu"
    for who in sorted(path for path in folder.iterdir() if path.is_dir()):
        for frames in sorted(who.glob("*.npy")):
            if not frames.with_suffix(".mp4").exists():
                write_mp4(frames.with_suffix(".mp4"), np.load(frames))
        bench = importlib.import_module("vbench").VBench(device, "", str(folder))
        bench.evaluate(
            videos_path=str(who),
            name=f"{who.name}-{dimension}",
            prompt_list=job["prompts"],
            dimension_list=[dimension],
            local=True,
            mode="custom_input",
        )


def write_mp4(path: Path, frames: np.ndarray) -> None:
    cv2 = importlib.import_module("cv2")
    height, width = frames.shape[1:3]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), FRAMES_PER_SECOND, (width, height))
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))  # OpenCV's order of colours
    writer.release()


if __name__ == "__main__":
    main()
