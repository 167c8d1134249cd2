#include "cuda/launch.cuh"
#include "cuda/whiten.cuh"

namespace ppo {
namespace {

WhitenInputs whiten_inputs(const Tensor& x, const OptTensor& mask) {
  check_dtype(x, ScalarType::Float);
  STD_TORCH_CHECK(x.is_contiguous(), "expected a contiguous tensor");
  const auto flat = [](const void* data) { return data != nullptr ? TokenKind::kFlat : TokenKind::kAbsent; };
  const uint8_t* valid = nullptr;
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool || mask->scalar_type() == ScalarType::Byte,
                    "masks are bytes");
    STD_TORCH_CHECK(mask->is_contiguous(), "expected a contiguous mask");
    check_same_shape(*mask, x);
    valid = static_cast<const uint8_t*>(mask->data_ptr());
  }
  const auto* data = static_cast<const float*>(x.data_ptr());
  return {{nullptr, 1, x.numel(), x.numel(), 0.0}, {data, 0, flat(data)}, {valid, 0, flat(valid)}};
}

int64_t whiten_blocks(const Tensor& x) { return std::clamp<int64_t>(whiten_chunks(x.numel()), 1, kWhitenBlocks); }

std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& x, const OptTensor& mask) {
  PPO_COUNT("moments");
  const Launcher launch(x);
  const int64_t blocks = whiten_blocks(x);
  const auto doubles = [](const Tensor& t) { return static_cast<double*>(t.data_ptr()); };
  const Tensor count = empty({}, ScalarType::Double, x), mean = empty({}, ScalarType::Double, x),
               m2 = empty({}, ScalarType::Double, x), partials = empty({3 * blocks}, ScalarType::Double, x);
  const Tensor ticket = launch.tickets(1, x);
  launch(moments_kernel, blocks, kWhitenThreads, whiten_inputs(x, mask),
         MomentOutputs{doubles(partials), doubles(count), doubles(mean), doubles(m2),
                       static_cast<unsigned*>(ticket.data_ptr())});
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
  const Tensor partials = empty({count.has_value() ? 0 : 3 * blocks}, ScalarType::Double, x);
  MomentSources from{};
  if (count.has_value()) {
    STD_TORCH_CHECK(mean.has_value() && m2.has_value(), "count, mean and m2 come together");
    const auto scalar = [](const OptTensor& t) { return data_or_null<double>(t, 1, ScalarType::Double); };
    from = {scalar(count), scalar(mean), scalar(m2), 1};
  } else {
    auto* parts = static_cast<double*>(partials.data_ptr());
    launch(moments_kernel, blocks, kWhitenThreads, in, MomentOutputs{parts, nullptr, nullptr, nullptr, nullptr});
    from = {parts, parts + blocks, parts + 2 * blocks, static_cast<unsigned>(blocks)};
  }
  launch(whiten_kernel, blocks, kWhitenThreads, in, from, WhitenOptions{shift_mean, unbiased, eps},
         static_cast<float*>(y.data_ptr()));
  return y;
}

}  // namespace
}  // namespace ppo

PPO_CUDA_OPS(m) {
  m.impl("moments", TORCH_BOX(&ppo::moments));
  m.impl("whiten", TORCH_BOX(&ppo::whiten));
}
