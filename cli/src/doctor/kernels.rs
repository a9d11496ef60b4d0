//! What lies beside the driver: MPS, the run-time compiler, compiled kernels, calibrations.

use kvoyant_cuda::KernelCache;
use kvoyant_daemon::device::cuda::store::{Calibration, Identity};
use kvoyant_daemon::device::cuda::{kernel_folder, mps_runs};

use super::check::Report;
use super::gpu::Patient;

/// All checks of this room.
pub(crate) fn examine(patient: &Patient<'_>, report: &mut Report) {
    mps(report);
    let cache = KernelCache::new(kernel_folder(&patient.config.state));
    compiler(patient, report, &cache);
    folder(patient, report);
    calibration(patient, report);
}

fn mps(report: &mut Report) {
    if mps_runs() {
        report.pass("mps", "runs: kernels and copies of daemon and engines overlap");
    } else {
        report.warn(
            "mps",
            "does not run: kernels of two processes take turns, so the daemon uses copy engines alone",
            "if that is too slow, nvidia-cuda-mps-control -d as the daemon's user; see docs/gpu.md",
        );
    }
}

fn compiler(patient: &Patient<'_>, report: &mut Report, cache: &KernelCache) {
    match cache.compiler() {
        Ok(compiler) => {
            let (major, minor) = compiler.version();
            let place = compiler.place();
            let driver = patient.driver.version();
            if (major as i32) > driver / 1000 {
                let found = format!(
                    "{major}.{minor} ({place}) is newer than the driver, which may refuse its kernels"
                );
                report.warn("nvrtc", found, format!("pip install nvidia-cuda-nvrtc-cu{}", driver / 1000));
            } else {
                report.pass("nvrtc", format!("{major}.{minor} ({place})"));
            }
        }
        Err(none) => {
            let arch = patient.info.compute;
            let kept = kvoyant_kernels::cuda::SOURCES
                .iter()
                .filter(|source| cache.cubin(source, arch).is_ok())
                .count();
            let all = kvoyant_kernels::cuda::SOURCES.len();
            if kept == all {
                report.pass(
                    "nvrtc",
                    format!("not here, and not needed: all {all} sources are compiled for this card"),
                );
            } else {
                report.warn(
                    "nvrtc",
                    "not here: the daemon copies with copy engines alone, and the reference engine cannot attend on the GPU",
                    none.to_string(),
                );
            }
        }
    }
}

/// Whether something can be kept between starts.
fn folder(patient: &Patient<'_>, report: &mut Report) {
    let state = &patient.config.state;
    // The nearest folder that exists is the one whose permissions count.
    let nearest = state.ancestors().find(|folder| folder.exists());
    let writable = nearest.is_some_and(|folder| tempfile::tempfile_in(folder).is_ok());
    if writable {
        report.pass("state", format!("{}: calibrations and compiled kernels are kept", state.display()));
    } else {
        report.warn(
            "state",
            format!("{} cannot be written: kernels are compiled at each start", state.display()),
            "name a folder of the daemon's user with --state, or StateDirectory= in the unit",
        );
    }
}

fn calibration(patient: &Patient<'_>, report: &mut Report) {
    let identity = Identity::new(patient.info, patient.driver.version());
    let command = format!("kvoyant calibrate --device cuda:{}", patient.info.ordinal);
    match Calibration::load(&patient.config.state, &identity) {
        Ok(Some(found)) => report.pass(
            "calibration",
            format!("of {}: host to device {:.1} GB/s", found.measured_at, found.costs.h2d_gbps),
        ),
        Ok(None) => {
            report.warn("calibration", "none: transfer engines are chosen by estimates", command);
        }
        Err(error) => report.warn("calibration", error.to_string(), command),
    }
}
