"""What tissue and grid of a slide of 100,000 x 80,000 pixels cost: seconds of processor time on one core, and memory.

python benchmarks/slides.py SLIDES --only huge
python benchmarks/large_slide.py SLIDES/huge.svs
"""

import resource
import sys
import time

import cv2

from hf_pathology.slides.grid import tile_grid
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.tissue import find_tissue


def main(path: str) -> None:
    cv2.setNumThreads(1)
    print("| open, s | tissue, s | grid, s | in all, s | tiles | memory of the process, GB |")
    print("|---|---|---|---|---|---|")
    for _ in range(5):
        times = [time.process_time()]
        with Slide(path) as slide:
            _ = slide.layout
            times.append(time.process_time())
            tissue = find_tissue(slide)
            times.append(time.process_time())
            grid = tile_grid(slide, tissue, key="huge", size=224, mpp=slide.mpp[0])
            times.append(time.process_time())
        steps = [f"{after - before:.3f}" for before, after in zip(times, times[1:])]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"| {' | '.join(steps)} | {times[-1] - times[0]:.3f} | {len(grid):,} | {memory:.2f} |")


if __name__ == "__main__":
    main(sys.argv[1])
