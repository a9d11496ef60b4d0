//! Rows that answers left out: their estimate is merged, and what comes of it is certified.

use kvoyant_client::{Answer, Hint, Member};
use kvoyant_kernels::Kernels;
use kvoyant_methods::{Certificate, HintSource};

use super::measure::Exact;
use super::{DaemonError, DaemonKv, DaemonSequence};

impl DaemonKv {
    /// Merges what the daemon estimates of the rows that an answer left out into attention over the others, `out` `[members][Hq][d]` and
    /// `lse` `[members][Hq]`. Members whose rows were chosen ahead are asked for again, by their true queries. What each query head may have
    /// missed, where that is known: `[members][Hq]`; and the rows of each member that the daemon's CPU attended now.
    pub(super) fn add_rest(
        &mut self,
        layer: usize,
        answer: &Answer,
        batch: &[&DaemonSequence],
        positions: &[usize],
        queries: &[f32],
        (out, lse): (&mut [f32], &mut [f32]),
    ) -> Result<(Vec<Option<Certificate>>, Vec<Exact>), DaemonError> {
        let heads = self.shape.query_heads;
        let width = heads * self.shape.head_dim;
        let mut certificates = vec![None; batch.len() * heads];
        let mut exact = vec![Exact::default(); batch.len()];
        let later = |i: &usize| {
            let needs = self.needs_of(batch[*i]);
            needs.rest && needs.hint != HintSource::Current
        };
        let asked: Vec<usize> = (0..batch.len()).filter(later).collect();
        let again = if asked.is_empty() {
            None
        } else {
            let members: Vec<Member<'_>> = asked
                .iter()
                .map(|&i| Member {
                    sequence: batch[i].inner(),
                    position: positions[i],
                    hint: Hint::Beside {
                        query: &queries[i * width..(i + 1) * width],
                        floors: &lse[i * heads..(i + 1) * heads],
                    },
                })
                .collect();
            let pending = self.model.rest(layer, &members).map_err(DaemonError::from);
            let again = match self.unless_all_late(pending)? {
                Some(pending) => self.wait(pending)?,
                None => None,
            };
            self.stats.fallbacks.estimates += if again.is_none() { asked.len() as u64 } else { 0 };
            again
        };
        for i in 0..batch.len() {
            let (out, lse) = (&mut out[i * width..][..width], &mut lse[i * heads..][..heads]);
            let (answer, member) = match (asked.iter().position(|asked| *asked == i), &again) {
                (Some(member), Some(again)) => {
                    if let Some(partial) = again.partial(member) {
                        Kernels::best().merge(out, lse, partial.out, partial.lse);
                        exact[i] = Exact { rows: partial.rows, lse: partial.lse.to_vec() };
                    }
                    (&**again, member)
                }
                _ => (answer, i),
            };
            let Some(rest) = answer.rest(member) else { continue };
            let d = self.shape.head_dim;
            let mut mean = vec![0.0; d];
            for (h, sums) in rest.sums().enumerate() {
                let (out, lse) = (&mut out[h * d..][..d], &mut lse[h..=h]);
                let attended = lse[0];
                rest.mean(h, &mut mean);
                Kernels::best().merge(out, lse, &mean, &[sums.lse()]);
                if sums.rows == 0 || sums.is_certified() {
                    let certificate = sums.certify(attended, out);
                    self.stats.certified.add(&certificate);
                    certificates[i * heads + h] = Some(certificate);
                }
            }
        }
        self.stats.rows_cpu += exact.iter().map(|exact| u64::from(exact.rows)).sum::<u64>();
        Ok((certificates, exact))
    }
}
