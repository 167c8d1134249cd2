#include "cuda/launch.cuh"
#include "cuda/whiten.cuh"

namespace ppo {
namespace {

WhitenInputs whiten_inputs(const Tensor& x, const OptTensor& mask) {
  WhitenInputs in{{nullptr, 1, x.numel(), x.numel(), 0.0},
                  {contiguous_data<float>("x", x, x)},
                  {contiguous_data<uint8_t>("mask", mask, x)},
                  false};
  in.aligned = flat_and_aligned(in.rows, in.x, in.mask);
  return in;
}

int64_t whiten_blocks(const Tensor& x) { return std::min(whiten_chunks(x.numel()), kWhitenBlocks); }

std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& x, const OptTensor& mask) {
  PPO_COUNT("moments");
  const Launcher launch(x);
  const int64_t blocks = std::max<int64_t>(whiten_blocks(x), 1);
  const Tensor count = empty({}, ScalarType::Double, x), mean = empty({}, ScalarType::Double, x),
               m2 = empty({}, ScalarType::Double, x),
               partials = empty({WhitenPartials::kCount * blocks}, ScalarType::Double, x);
  auto* parts = data_of<double>(partials);
  launch(moments_kernel, blocks, kWhitenThreads, whiten_inputs(x, mask), parts);
  launch.dependent(moments_fold_kernel, 1, kFoldThreads, parts, blocks, data_of<double>(count), data_of<double>(mean),
                   data_of<double>(m2));
  return std::make_tuple(count, mean, m2);
}

// Two launches: in one, every block would have to wait for all others, which only a cooperative launch makes safe.
Tensor whiten(const Tensor& x, const OptTensor& mask, const OptTensor& count, const OptTensor& mean,
              const OptTensor& m2, bool shift_mean, bool unbiased, double eps) {
  PPO_COUNT("whiten");
  const Launcher launch(x);
  const WhitenInputs in = whiten_inputs(x, mask);
  const int64_t blocks = whiten_blocks(x);
  const Tensor y = empty(x.sizes(), ScalarType::Float, x);
  const Tensor partials = empty({count.has_value() ? 0 : WhitenPartials::kCount * blocks}, ScalarType::Double, x);
  check_together(count, mean, m2);
  const RowVector<double> given[] = {{"count", count, {}}, {"mean", mean, {}}, {"m2", m2, {}}};
  const WhitenOptions options{shift_mean, unbiased, eps};
  if (count.has_value()) {
    const MomentSources from{given[0].data(), given[1].data(), given[2].data(), nullptr, 0};
    launch(whiten_kernel, blocks, kWhitenThreads, in, from, options, data_of<float>(y));
  } else {
    auto* parts = data_of<double>(partials);
    const MomentSources from{nullptr, nullptr, nullptr, parts, blocks};
    launch(moments_kernel, blocks, kWhitenThreads, in, parts);
    launch.dependent(whiten_kernel, blocks, kWhitenThreads, in, from, options, data_of<float>(y));
  }
  return y;
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CUDA, m) {
  PPO_IMPL(m, "moments", ppo::moments);
  PPO_IMPL(m, "whiten", ppo::whiten);
}
