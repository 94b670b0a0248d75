"""Labelled images from formulas: fractals, for training a model without photographs.

A class is an iterated function system, some maps x -> A x + b of the plane that contract it. Its images are the set
that the maps leave as it is, the attractor, drawn by the chaos game: points jump by maps chosen at random, and the
places they come to are drawn. After FractalDB (Kataoka et al. 2020, arXiv:2101.08515), whose maps have random entries;
here they are drawn by their singular values, as in Anderson & Farrell 2022 (arXiv:2110.03091), so that each contracts.
As in FractalDB, a class must fill a part of its picture, and its images differ by a factor of 0.8 to 1.2 on one part of
one map. Here they are turned by any angle, mirrored, and coloured at random, too: colour, place and direction say
nothing of the class.

seed, class number -> System -> jittered systems -> points (M, P, 2) -> counts (M, S, S) -> images (M, S, S, 3)
"""

from typing import NamedTuple, Union

import numpy as np

SIDE = 64
MAPS = 2, 6  # as few and as many maps as a class has
WALKERS, STEPS, SKIP = 250, 84, 20  # points of an image that jump at a time, how often, and how often before they count
FILLED = 0.2, 0.7  # part of the picture that a class fills


class System(NamedTuple):
    """Iterated function systems, M of them, with N maps: A = rotation, then two scales, then another rotation.

    Maps that are not there have the scales 0, and are never chosen.
    """

    angles: np.ndarray  # (M, N, 2)
    scales: np.ndarray  # (M, N, 2), in (0, 1); negative ones mirror
    shifts: np.ndarray  # (M, N, 2)


def draw_systems(count: int, generator: np.random.Generator) -> System:
    """Return random systems of contractions."""
    shape = count, MAPS[1], 2
    scales = generator.uniform(0.3, 0.9, shape)
    scales[..., 1] *= generator.uniform(0.3, 1, shape[:2])  # a thin map makes leaves, a round one makes clouds
    scales[..., 1] *= generator.choice([-1, 1], shape[:2])
    numbers = generator.integers(MAPS[0], MAPS[1] + 1, count)
    scales[np.arange(MAPS[1]) >= numbers[:, None]] = 0
    return System(generator.uniform(-np.pi, np.pi, shape), scales, generator.uniform(-1, 1, shape))


def jitter(system: System, count: int, generator: np.random.Generator) -> System:
    """Return `count` variants of one system (M = 1): in each, one part of one map is 0.8 to 1.2 times as large."""
    maps = int((system.scales[0, :, 0] > 0).sum())
    parts = [np.repeat(part, count, axis=0) for part in system]
    factors = np.ones((3, *parts[0].shape))
    places = generator.integers(3, size=count), np.arange(count), generator.integers(maps, size=count)
    factors[(*places, generator.integers(2, size=count))] = generator.uniform(0.8, 1.2, count)
    angles, scales, shifts = (part * factor for part, factor in zip(parts, factors))
    return System(angles, np.clip(scales, -0.95, 0.95), shifts)


def rotations(angles: np.ndarray) -> np.ndarray:
    """Return the matrices (..., 2, 2) of rotations."""
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


def attractors(systems: System, generator: np.random.Generator, steps: int = STEPS) -> np.ndarray:
    """Return points (M, P, 2) of the sets that systems leave as they are."""
    angles, scales, shifts = systems
    matrices = (rotations(angles[..., 0]) * scales[..., None, :]) @ rotations(angles[..., 1])
    areas = abs(scales.prod(-1))
    ends = areas.cumsum(1) / areas.sum(1, keepdims=True)  # a map is chosen as often as its picture is large
    chances = (np.arange(256) + 0.5) / 256
    chosen = (chances[None, :, None] > ends[:, None, :]).sum(-1)  # (M, 256): a map for a random byte
    count = len(scales)
    flat = np.concatenate([matrices.reshape(count, -1, 4), shifts], -1).reshape(-1, 6).astype(np.float32)
    rows = (chosen + np.arange(count)[:, None] * scales.shape[1]).astype(np.int32)
    bytes_ = generator.integers(0, 256, (steps, count, WALKERS), np.uint8)
    x = y = np.zeros((count, WALKERS), np.float32)
    points = np.empty((steps - SKIP, 2, count, WALKERS), np.float32)
    for step in range(steps):
        a, b, c, d, e, f = flat[np.take_along_axis(rows, bytes_[step], axis=1)].transpose(2, 0, 1)
        x, y = a * x + b * y + e, c * x + d * y + f
        if step >= SKIP:
            points[step - SKIP] = x, y
    return points.transpose(2, 0, 3, 1).reshape(count, -1, 2)


def turn(points: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return points (M, P, 2), those of each image turned by any angle, and half of them mirrored."""
    matrices = rotations(generator.uniform(0, 2 * np.pi, len(points)))
    matrices[:, 0] *= generator.choice([-1, 1], (len(points), 1))
    return points @ matrices.astype(np.float32)


def counts(points: np.ndarray, side: int = SIDE, room: Union[np.ndarray, float] = 1.0) -> np.ndarray:
    """Return how many of the points (M, P, 2) each pixel has: (M, side, side), the longer side being `room` of it."""
    low, high = points.min(1, keepdims=True), points.max(1, keepdims=True)
    scale = (side - 1) * np.reshape(room, (-1, 1, 1)) / np.maximum((high - low).max(-1, keepdims=True), 1e-6)
    pixels = ((points - (low + high) / 2) * scale + side / 2).astype(np.int32)
    index = (np.arange(len(points))[:, None] * side + pixels[..., 1]) * side + pixels[..., 0]
    return np.bincount(index.ravel(), minlength=len(points) * side * side).reshape(-1, side, side)


def colour(drawn: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return images (M, S, S, 3) of counts: one colour behind, and two that pass into another by density."""
    number = len(drawn)
    behind, first, second = generator.uniform(0, 1, (3, number, 1, 1, 3))
    dark = behind.mean(-1, keepdims=True) < 0.5
    first, second = (np.where(dark, 1 - shade / 2, shade / 2) for shade in (first, second))
    amount = (np.log1p(drawn) / np.log1p(drawn.max((1, 2), keepdims=True)))[..., None]
    images = np.where(drawn[..., None] > 0, first + (second - first) * amount, behind)
    return (255 * images).round().astype(np.uint8)


def fractal(number: int, seed: int = 0) -> System:
    """Return the system of a class: the first of a random series that fills neither too little nor too much."""
    generator = np.random.default_rng([seed, number, 0])
    while True:
        systems = draw_systems(16, generator)
        filled = (counts(attractors(systems, generator)) > 0).mean((1, 2))
        for index in np.flatnonzero((filled > FILLED[0]) & (filled < FILLED[1])):
            return System(*(part[index : index + 1] for part in systems))


def images_of(number: int, count: int, seed: int = 0) -> np.ndarray:
    """Return images (count, 64, 64, 3) of a class; the same number and seed give the same images."""
    generator = np.random.default_rng([seed, number, 1])
    points = turn(attractors(jitter(fractal(number, seed), count, generator), generator), generator)
    return colour(counts(points, room=generator.uniform(0.7, 1, count)), generator)
