"""TinyLLaVA-Video in Flax NNX, folded: a video language model as a showcase.

The architecture of Zhang, Weng, Yue et al. (arXiv 2501.15513) to the shapes and behaviour of the
public model: a SigLIP tower over frames, a video-level group resampler, and a small language model
(Qwen2.5-3B or Phi-2). See README.md in this folder.
"""
