"""TPU chips as published, and the slices that are built of them.

Sources: the pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)" of the Cloud TPU documentation, read in 2026.
They give the interconnect of a chip in both directions together (v5p: 1200 GB/s; formerly 4800 Gbit/s, one direction, which is the
same); here a link is counted in one direction. That a link carries so much one way follows from what the pages give for a pod: the
bisection of a 16x16 torus cuts 32 links, 1.6 TB/s on v5e and 3.2 TB/s on v6e. For v4, whose page has no such figure, the link is
that of Jouppi et al. 2023 (arXiv:2304.01433), 6 of 50 GB/s; its page has 24 TB/s for the bisection of 4096 chips, 512 links.
"""

import dataclasses
import functools
import itertools
import math

from scaling_jax.errors import UserError

GIB = 2**30
PLANAR_SHAPES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
PART_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # smaller than a cube of 4x4x4, and without its wrap-around links
CUBE = 4
MAX_SLICES = 1000  # more than anybody has; names of slices and hosts end in a number of three digits


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, in its vendor's figures: none of them is reached in full.

    Attributes:
      name: as in libtpu's topologies, "v5p".
      cloud_type: the same in Google Cloud's accelerator types, "v5litepod" for v5e.
      flops_bf16: FLOP per second, bfloat16 products.
      hbm_bytes: memory.
      hbm_bytes_per_s: of that memory, reads and writes together.
      ici_links, ici_link_bytes_per_s: links to neighbours, two for each dimension of the torus, and what one carries one way.
      torus_dimensions: 2 or 3.
      cores: TensorCores, which Cloud's accelerator types count.
      devices_per_chip: that jax shows on such a machine.
      compiler_hbm_bytes: of one device of the compile-only topology, what libtpu 0.0.42.1 calls available in its message when a program
        is too large.
      chips_per_host: of a slice of several hosts; slices of one host may have 1, 4 or 8 (`Topology.host_shape`).
      dcn_bytes_per_s: what a host of chips_per_host sends over the data-centre network.
      max_chips: of the largest slice.
      source: where the figures stand, and what in them is assumed.
    """

    name: str
    cloud_type: str
    flops_bf16: float
    hbm_bytes: int
    hbm_bytes_per_s: float
    ici_link_bytes_per_s: float
    torus_dimensions: int
    cores: int
    devices_per_chip: int
    compiler_hbm_bytes: int
    dcn_bytes_per_s: float
    max_chips: int
    source: str
    chips_per_host: int = 4

    @property
    def ici_links(self) -> int:
        return 2 * self.torus_dimensions

    @property
    def ici_bytes_per_s(self) -> float:
        """What one chip can send over all of its links together."""
        return self.ici_links * self.ici_link_bytes_per_s


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            cloud_type="v4",
            flops_bf16=275e12,
            hbm_bytes=32 * GIB,
            hbm_bytes_per_s=1200e9,
            ici_link_bytes_per_s=50e9,
            torus_dimensions=3,
            cores=2,
            devices_per_chip=1,
            compiler_hbm_bytes=int(30.75 * GIB),
            dcn_bytes_per_s=25e9,
            max_chips=4096,
            source="Cloud TPU page 'TPU v4'; links: Jouppi et al. 2023, arXiv:2304.01433; network: none published, assumed as v5p",
        ),
        Chip(
            name="v5e",
            cloud_type="v5litepod",
            flops_bf16=197e12,
            hbm_bytes=16 * GIB,
            hbm_bytes_per_s=819e9,
            ici_link_bytes_per_s=50e9,
            torus_dimensions=2,
            cores=1,
            devices_per_chip=1,
            compiler_hbm_bytes=int(15.75 * GIB),
            dcn_bytes_per_s=12.5e9,
            max_chips=256,
            source="Cloud TPU page 'TPU v5e'; interconnect 400 GB/s both ways; network 6.4 Tbit/s for 256 chips",
        ),
        Chip(
            name="v5p",
            cloud_type="v5p",
            flops_bf16=459e12,
            hbm_bytes=95 * GIB,
            hbm_bytes_per_s=2765e9,
            ici_link_bytes_per_s=100e9,
            torus_dimensions=3,
            cores=2,
            devices_per_chip=1,
            compiler_hbm_bytes=int(95.74 * GIB),
            dcn_bytes_per_s=25e9,
            max_chips=6144,
            source="Cloud TPU page 'TPU v5p'; interconnect 1200 GB/s both ways; network 50 Gbit/s a chip",
        ),
        Chip(
            name="v6e",
            cloud_type="v6e",
            flops_bf16=918e12,
            hbm_bytes=32 * GIB,
            hbm_bytes_per_s=1638e9,
            ici_link_bytes_per_s=100e9,
            torus_dimensions=2,
            cores=1,
            devices_per_chip=1,
            compiler_hbm_bytes=int(31.25 * GIB),
            dcn_bytes_per_s=50e9,
            max_chips=256,
            source="Cloud TPU pages 'TPU v6e' and 'TPU7x (Ironwood)'; interconnect 800 GB/s both ways; network 100 Gbit/s a chip",
        ),
        Chip(
            name="tpu7x",
            cloud_type="tpu7x",
            flops_bf16=2307e12,
            hbm_bytes=192 * GIB,
            hbm_bytes_per_s=7380e9,
            ici_link_bytes_per_s=100e9,
            torus_dimensions=3,
            cores=2,
            devices_per_chip=2,
            compiler_hbm_bytes=int(94.75 * GIB),
            dcn_bytes_per_s=50e9,
            max_chips=9216,
            source="Cloud TPU page 'TPU7x (Ironwood)'; interconnect 1200 GB/s both ways; network 100 Gbit/s a chip",
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` equal slices of one chip; chips, hosts and devices are those of all slices unless the name says otherwise."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As libtpu and `parse_topology` read it, "v5p:8x8x8": of one slice."""
        return f"{self.chip.name}:{self.shape_name}"

    @property
    def shape_name(self) -> str:
        """As gcloud's `--topology` reads it, "8x8x8"."""
        return "x".join(map(str, self.shape))

    @property
    def accelerator_type(self) -> str:
        """Cloud's name for a slice, by its TensorCores, "v5p-1024"; the same for all shapes of as many chips."""
        return f"{self.chip.cloud_type}-{self.slice_chips * self.chip.cores}"

    @property
    def slice_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def slice_hosts(self) -> int:
        return self.slice_chips // math.prod(self.host_shape)

    @property
    def slice_devices(self) -> int:
        return self.slice_chips * self.chip.devices_per_chip

    @property
    def chips(self) -> int:
        return self.slices * self.slice_chips

    @property
    def hosts(self) -> int:
        """Virtual machines of Cloud TPU. GKE gives v5e and v6e of 2x4 as two machines of 4 chips, not as one of 8."""
        return self.slices * self.slice_hosts

    @property
    def devices(self) -> int:
        return self.slices * self.slice_devices

    @property
    def host_shape(self) -> tuple[int, int, int]:
        """Chips of one host, libtpu's chips_per_host_bounds: 2x2x1, save for slices of one chip and of 2x4."""
        if self.slice_chips == 1 or self.shape == (2, 4):
            return (*self.shape, 1, 1)[:3]
        return 2, 2, 1


@functools.cache
def shapes(chip: Chip) -> tuple[tuple[int, ...], ...]:
    """Shapes of a slice that Cloud offers, smallest first; of equal ones the most cube-like first, which is Cloud's default."""
    if chip.torus_dimensions == 2:
        return PLANAR_SHAPES
    sides = range(CUBE, chip.max_chips // CUBE**2 + 1, CUBE)
    cubes = [shape for shape in itertools.combinations_with_replacement(sides, 3) if math.prod(shape) <= chip.max_chips]
    single = ((1, 1, 1),) if chip.name == "tpu7x" else ()
    return (*single, *PART_CUBES, *sorted(cubes, key=lambda shape: (math.prod(shape), sum(shape))))


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Reads "v5p:8x8x8", a chip and the shape of one slice.

    Raises:
      UserError: for an unknown chip, a shape that no slice of it has, or slices not from 1 to MAX_SLICES; the message has what there is.
    """
    chip_name, _, shape_name = text.partition(":")
    if chip_name not in CHIPS:
        raise UserError(f"topology is '{text}': must be a chip and a shape, such as v5p:4x4x4; chips are {', '.join(CHIPS)}")
    chip = CHIPS[chip_name]
    sides = shape_name.split("x")
    shape = tuple(int(side) for side in sides) if all(side.isascii() and side.isdigit() and len(side) < 4 for side in sides) else ()
    if not _is_shape(chip, shape):
        raise UserError(f"topology is '{text}': {chip.name} has {_shapes_text(chip)}")
    if slices < 1:
        raise UserError(f"slices is {slices}: must be at least 1")
    if slices > MAX_SLICES:
        raise UserError(f"slices is {slices}: must be at most {MAX_SLICES}")
    return Topology(chip, shape, slices)


def _is_shape(chip: Chip, shape: tuple[int, ...]) -> bool:
    return len(shape) == chip.torus_dimensions and math.prod(shape) <= chip.max_chips and shape in shapes(chip)


def _shapes_text(chip: Chip) -> str:
    if chip.torus_dimensions == 2:
        return ", ".join("x".join(map(str, shape)) for shape in PLANAR_SHAPES)
    parts = [shape for shape in shapes(chip) if math.prod(shape) < CUBE**3]
    listed = ", ".join("x".join(map(str, shape)) for shape in parts)
    return f"{listed}, and AxBxC of at most {chip.max_chips} chips with A ≤ B ≤ C, all multiples of {CUBE}, such as 4x4x8"
