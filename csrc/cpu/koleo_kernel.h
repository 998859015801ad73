// The CPU kernels of koleo, compiled once per instruction set (for_each_isa.h).

#include "numbers.h"
#include "product.h"

// For prototypes begin … end - 1 of the chunk that starts at `start`: h [chunk, stride], the rows' products with
// each prototype times (g / |v|)^2, and dv and dg where asked for. room [kGramBlock, dim], where they are added to.
void gram_block(const GramProblem& p, int64_t start, int64_t begin, int64_t end, float* h, float* room) {
  for (int64_t k = begin; k < end; k += kGramBlock) {
    const int64_t n = end - k < kGramBlock ? end - k : kGramBlock;
    const float* const v = p.v + k * p.dim;
    float* const raw = h + (k - start) * p.stride;
    float norm[kGramBlock];
    row_norms(v, n, p.dim, norm);
    product<false>(v, p.columns, raw, {p.dim, 1, kPacked, p.stride}, n, p.stride, p.dim, false);
    if (p.dv != nullptr) {
      float *const sum = p.dv + k * p.dim, *const dv = p.adds ? room : sum;
      if (p.by_rows) product<false>(raw, p.right, dv, {p.stride, 1, kPacked, p.dim}, n, p.dim, p.rows, false);
      else product<false>(v, p.right, dv, {p.dim, 1, kPacked, p.dim}, n, p.dim, p.dim, false);
      for (int64_t i = 0; i < n; ++i) {
        const float* const row = v + i * p.dim;
        float* const out = dv + i * p.dim;
        // The gradient of W is `out` times g / |v|. The weight norm's derivative takes out what is along v.
        double along = 0.0;
#pragma omp simd reduction(+ : along)
        for (int64_t j = 0; j < p.dim; ++j) along += static_cast<double>(out[j]) * row[j];
        const float scale = p.g[k + i] / norm[i];
        const float share = static_cast<float>(along / (static_cast<double>(norm[i]) * norm[i]));
        const float of_scale = scale * share * norm[i];
        p.dg[k + i] = p.adds ? p.dg[k + i] + of_scale : of_scale;
#pragma omp simd
        for (int64_t j = 0; j < p.dim; ++j) out[j] = scale * scale * (out[j] - share * row[j]);
        for (int64_t j = 0; p.adds && j < p.dim; ++j) sum[i * p.dim + j] += out[j];
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const float scale = p.g[k + i] / norm[i];
#pragma omp simd
      for (int64_t j = 0; j < p.stride; ++j) raw[i * p.stride + j] *= scale * scale;
    }
  }
}

// sum [rows, columns] += hᵀ · v over a chunk of `depth` prototypes.
void gram_rows(
    const GramProblem& p, const float* h, const float* v, int64_t rows, int64_t columns, int64_t depth,
    float* sum) {
  add_transposed_product<false>(h, p.stride, v, p.dim, sum, p.dim, rows, columns, depth);
}
