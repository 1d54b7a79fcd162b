"""Sources of Clips.

    clips                               the one noun: frames and what is known about them
    worlds, laws, phenomena, scenery    phyworld's worlds and nine phenomena: how they move and look
    templates, bodies, fluids           what needs an engine: bodies that meet, smoke and flame
    phyworld, videos, decoding          files: phyworld's HDF5, folders of real videos
    sources, catalogue, simulators      one interface for all of them, mixtures as one stream, names
    captions                            what a clip is said to show
    takes                               second takes of a simulated clip
    variants, impossible, unlawful,     clips that break a law: of any scenario, of the worlds, of the phenomena,
    unlawful_fluids                     of smoke and flames

Every clip is a function of its source, seed and number alone.
"""

from physnb.data.captions import CAPTIONS, VOCABULARY, encode_captions, vocabulary_of, write_captions
from physnb.data.clips import DISC_COLOURS, FRAME_STEP_S, WORLD_SIZE, Clip, DiscState
from physnb.data.random import hash_draws, normal_noise, uniform_draws
from physnb.data.simulators import SimulatedSource, simulate
from physnb.data.sources import Mixture, Source
from physnb.data.takes import second_take
from physnb.data.worlds import render

__all__ = [
    "CAPTIONS", "DISC_COLOURS", "FRAME_STEP_S", "VOCABULARY", "WORLD_SIZE", "Clip", "DiscState", "Mixture",
    "SimulatedSource", "Source", "encode_captions", "hash_draws", "normal_noise", "render", "second_take", "simulate",
    "uniform_draws", "vocabulary_of", "write_captions",
]  # fmt: skip
