"""A thin RLHF trainer: DeepSpeed distributes, transformers models, ppo_kernels does the arithmetic."""
