//! A method's estimate of the rows that are not attended, with what is needed to certify the answer made of both.

use kvoyant_kernels::Kernels;
pub use kvoyant_kernels::{Certificate, RestSums};

use crate::selection::Selection;

/// Per query head of one decode step, what the rows left out would have added: a mean value and its weight, to be merged like any
/// other partial attention, and [sums](RestSums) that bound how far off the merged answer is.
///
/// Its buffers are reused from one answer to the next.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rest {
    value_dim: usize,
    /// `[heads][dv]`
    means: Vec<f32>,
    sums: Vec<RestSums>,
    exact: Selection,
}

impl Rest {
    /// No heads yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets what it holds, keeps its buffers. Means have `value_dim` values from now on.
    pub fn clear(&mut self, value_dim: usize) {
        self.value_dim = value_dim;
        self.means.clear();
        self.sums.clear();
        self.exact.clear();
    }

    /// Adds the next query head: gives its mean, zeros, to be filled.
    pub fn push(&mut self) -> (&mut [f32], &mut RestSums) {
        let at = self.means.len();
        self.means.resize(at + self.value_dim, 0.0);
        self.sums.push(RestSums::NOTHING);
        let last = self.sums.len() - 1;
        (&mut self.means[at..], &mut self.sums[last])
    }

    /// Query heads so far: none where the method estimates nothing.
    #[must_use]
    pub fn heads(&self) -> usize {
        self.sums.len()
    }

    /// The mean value `[dv]` of what a query head left out.
    #[must_use]
    pub fn mean(&self, head: usize) -> &[f32] {
        &self.means[head * self.value_dim..][..self.value_dim]
    }

    /// All means, `[heads][dv]`.
    #[must_use]
    pub fn means(&self) -> &[f32] {
        &self.means
    }

    /// Rows that are in no sum: they are to be attended exactly now, beside what is attended already. Of every KV head of the request, or
    /// of none.
    #[must_use]
    pub fn exact(&self) -> &Selection {
        &self.exact
    }

    /// The same, to be filled.
    pub fn exact_mut(&mut self) -> &mut Selection {
        &mut self.exact
    }

    /// What bounds are made of, for each query head.
    #[must_use]
    pub fn sums(&self) -> &[RestSums] {
        &self.sums
    }

    /// The same estimates, of which nothing is said, for there are rows that they do not know of.
    pub fn uncertify(&mut self) {
        for sums in &mut self.sums {
            *sums = RestSums { rows: sums.rows.max(1), ..*sums }.uncertified();
        }
    }

    /// Merges the estimate into attention over the attended rows, `out` `[heads][dv]` and `lse` `[heads]`, and certifies the result.
    /// `certificates` gets one a head.
    pub fn merge(
        &self,
        kernels: Kernels,
        out: &mut [f32],
        lse: &mut [f32],
        certificates: &mut Vec<Certificate>,
    ) {
        certificates.clear();
        let heads = out.chunks_exact_mut(self.value_dim.max(1)).zip(lse).zip(&self.sums).enumerate();
        for (head, ((out, lse), sums)) in heads {
            let attended = *lse;
            kernels.merge(out, std::slice::from_mut(lse), self.mean(head), &[sums.lse()]);
            certificates.push(sums.certify(attended, out));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_keep_their_own_means_and_sums() {
        let mut rest = Rest::new();
        rest.clear(2);
        rest.push().0.copy_from_slice(&[1.0, 2.0]);
        let (mean, sums) = rest.push();
        mean[1] = 3.0;
        sums.rows = 7;
        assert_eq!((rest.heads(), rest.mean(0), rest.mean(1)), (2, &[1.0, 2.0][..], &[0.0, 3.0][..]));
        assert_eq!((rest.sums()[0].rows, rest.sums()[1].rows), (0, 7));
        rest.clear(2);
        assert_eq!(rest.heads(), 0);
    }

    #[test]
    fn an_estimate_is_merged_by_its_weight_and_nothing_changes_where_nothing_is_left_out() {
        let mut rest = Rest::new();
        rest.clear(1);
        let (mean, sums) = rest.push();
        mean[0] = 4.0;
        *sums = RestSums { max: 0.0, weight: 1.0, upper: 1.0, lower: 1.0, rows: 1, ..RestSums::NOTHING };
        rest.push();
        let (mut out, mut lse, mut certificates) = ([2.0, 2.0], [0.0, 0.0], Vec::new());
        rest.merge(Kernels::best(), &mut out, &mut lse, &mut certificates);
        assert!((out[0] - 3.0).abs() < 1e-6 && out[1] == 2.0, "{out:?}");
        assert!((certificates[0].missed_mass - 0.5).abs() < 1e-3, "{certificates:?}");
        assert_eq!(certificates[1], Certificate::default());
    }
}
