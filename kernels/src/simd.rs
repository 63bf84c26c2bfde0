//! Runs a loop with the widest vector instructions this processor has.
//!
//! The binary is built for the baseline of its architecture; `vectorize` compiles its closure once per instruction set
//! (AVX-512, AVX2, baseline) and picks at run time, so plain loops inside become wide ones.

/// Calls `f` compiled for the best instruction set found at run time. `f` and what it calls must be `#[inline(always)]`.
#[inline]
pub fn vectorize<R>(f: impl FnOnce() -> R) -> R {
    struct Call<F>(F);
    impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Call<F> {
        type Output = R;
        #[inline(always)]
        fn call(self) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Call(f))
}
