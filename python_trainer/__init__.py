"""A thin RLHF trainer: DeepSpeed distributes, transformers models and samples, ppo_kernels does the arithmetic."""
