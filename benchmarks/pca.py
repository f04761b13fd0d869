"""PCA of patches: ours against scikit-learn's, on the same uint8 values; prints one table.

    python benchmarks/pca.py                 # 1,000,000 patches of 16x16x3: minutes, and 7 GiB for scikit-learn's PCA
    python benchmarks/pca.py --rows 50000    # a quick look

Each method runs in a process of its own, which makes its data from the seed (not timed) and reports its seconds and its
peak memory, libraries included. `PatchCovariance` and `IncrementalPCA` see the patches in chunks, as they would come
from images (larger ones than scikit-learn's default, which helps it); `PCA` needs all of them at once, in float64.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np


PATCH_SIZE, KEPT, CHUNK, SEED = 16, 32, 10_000, 0
PATCH_DIM = 3 * PATCH_SIZE**2
METHODS = ("PatchCovariance (ours)", "IncrementalPCA", "PCA (covariance_eigh)")


def chunks(rows):
    """Patches (M,P) in uint8: random amounts of smooth patterns that fall like an image's spectrum, and noise."""
    generator = np.random.default_rng(SEED)
    patterns = np.linalg.qr(generator.standard_normal((PATCH_DIM, PATCH_DIM)))[0][:64].astype(np.float32)
    patterns *= (600 / np.arange(1, 65, dtype=np.float32))[:, None]
    for start in range(0, rows, CHUNK):
        count = min(CHUNK, rows - start)
        values = generator.standard_normal((count, 64), dtype=np.float32) @ patterns
        values += 8 * generator.standard_normal(values.shape, dtype=np.float32) + 128
        yield np.rint(values.clip(0, 255)).astype(np.uint8)


def ours(rows):
    import torch

    from ldae_hf.patch_covariance import PatchCovariance

    seconds = 0.0
    covariance = PatchCovariance(PATCH_DIM)
    for chunk in chunks(rows):
        start = time.perf_counter()
        covariance.update(chunk)
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    ones = torch.ones(PATCH_DIM, dtype=torch.float64)
    basis = covariance.principal_components(scale=ones, offset=0 * ones)
    return basis.components.numpy(), seconds + time.perf_counter() - start


def incremental(rows):
    from sklearn.decomposition import IncrementalPCA

    seconds = 0.0
    pca = IncrementalPCA(n_components=PATCH_DIM)
    for chunk in chunks(rows):
        chunk = chunk.astype(np.float64)
        start = time.perf_counter()
        pca.partial_fit(chunk)
        seconds += time.perf_counter() - start
    return pca.components_, seconds


def full(rows):
    from sklearn.decomposition import PCA

    patches = np.empty((rows, PATCH_DIM))
    for index, chunk in enumerate(chunks(rows)):
        patches[index * CHUNK : index * CHUNK + len(chunk)] = chunk
    start = time.perf_counter()
    pca = PCA(svd_solver="covariance_eigh", copy=False).fit(patches)
    return pca.components_, time.perf_counter() - start


def product_rate():
    """Float64 matrix product of this machine in FLOP/s, of the shape that a covariance has; the best of five."""
    left, right = np.random.default_rng(SEED).standard_normal((2, 10_000, PATCH_DIM))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        left.T @ right
        times.append(time.perf_counter() - start)
    return 2 * left.shape[0] * PATCH_DIM**2 / min(times)


def run_method(index, rows, file):
    components, seconds = (ours, incremental, full)[index](rows)
    np.save(file, components[:KEPT])
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mib": peak_mib}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="patches (default 1,000,000)")
    parser.add_argument("--method", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.method is not None:
        run_method(args.method, args.rows, args.file)
        return

    rate = product_rate()
    results, projectors = [], []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(len(METHODS)):
            file = f"{folder}/{index}.npy"
            command = [sys.executable, __file__, "--rows", str(args.rows), "--method", str(index), "--file", file]
            results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
            components = np.load(file)
            projectors.append(components.T @ components)

    flops = 2 * args.rows * PATCH_DIM**2
    print(f"PCA of {args.rows:,} x {PATCH_DIM}, {KEPT} leading components compared; float64 matrix product of this")
    print(f"machine: {rate / 1e9:.0f} GFLOP/s. Rate: 2 x rows x {PATCH_DIM}^2 over the time, eigenvectors included.\n")
    print("| method | seconds | ours is faster by | rate / float64 product | peak memory, MiB | subspace error |")
    print("|---|---|---|---|---|---|")
    for method, result, projector in zip(METHODS, results, projectors, strict=True):
        seconds = result["seconds"]
        error = np.linalg.norm(projector - projectors[-1], 2)
        print(
            f"| {method} | {seconds:.2f} | {seconds / results[0]['seconds']:.2f} x | {flops / seconds / rate:.0%} "
            f"| {result['peak_mib']:.0f} | {error:.1e} |"
        )


if __name__ == "__main__":
    main()
