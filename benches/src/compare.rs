use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use criterion::{Criterion, SamplingMode, Throughput};
use serde::{Deserialize, Serialize};

/// What one turn took.
pub struct Pair {
    /// The subject's time.
    pub subject: Duration,
    /// Its limit's time for the same work.
    pub limit: Duration,
}

/// One line of the results.
#[derive(Serialize, Deserialize)]
struct Figure {
    name: String,
    /// The subject's rate.
    value: f64,
    unit: String,
    /// The limit's rate.
    limit: f64,
    /// `value / limit`.
    ratio: f64,
}

/// Runs a bench whose `turn` does the same `bytes` of work twice, as subject and as limit, and records the ratio of the
/// medians.
///
/// # Errors
/// When the file of results cannot be read or written.
pub fn compare(name: &str, bytes: u64, mut turn: impl FnMut() -> Pair) -> Result<()> {
    let (warm_up, measurement, samples) = if quick() { (500, 2000, 10) } else { (2000, 10_000, 30) };
    // Benches run in their package's directory, where Criterion would make a target directory of its own.
    let mut criterion = Criterion::default()
        .output_directory(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/criterion")))
        .warm_up_time(Duration::from_millis(warm_up))
        .measurement_time(Duration::from_millis(measurement))
        .sample_size(samples)
        .configure_from_args();

    let (mut subjects, mut limits) = (Vec::new(), Vec::new());
    let mut turns = 0;
    let mut group = criterion.benchmark_group(name);
    // Each sample the same number of turns: the default's growing samples would take minutes where a turn takes seconds.
    group.sampling_mode(SamplingMode::Flat).throughput(Throughput::Bytes(bytes));
    group.bench_function("subject", |bencher| {
        bencher.iter_custom(|iterations| {
            let mut total = Duration::ZERO;
            for _ in 0..iterations {
                let Pair { subject, limit } = turn();
                turns += 1;
                subjects.push(subject);
                limits.push(limit);
                total += subject;
            }
            total
        });
    });
    group.finish();
    if subjects.is_empty() {
        return Ok(()); // Criterion was asked for another bench, or only to list them.
    }

    let rate = |times: &mut Vec<Duration>| {
        times.sort_unstable();
        bytes as f64 / 1e6 / times[times.len() / 2].as_secs_f64()
    };
    println!("{name}: medians of {turns} turns");
    result(name, rate(&mut subjects), "MB/s", rate(&mut limits))
}

/// Records one figure and its ratio to its limit, both measured in this run.
///
/// # Errors
/// When the file of results cannot be read or written.
pub fn result(name: &str, value: f64, unit: &str, limit: f64) -> Result<()> {
    let figure = Figure { name: name.into(), value, unit: unit.into(), limit, ratio: value / limit };
    println!("{name}: {value:.1} {unit}, limit {limit:.1} {unit}, ratio {:.3}", figure.ratio);
    match std::env::var_os("SEAWALL_BENCH_JSON") {
        Some(file) => record(Path::new(&file), figure),
        None => Ok(()),
    }
}

/// Whether only a short run was asked for: to see that the bench works.
pub fn quick() -> bool {
    std::env::var_os("SEAWALL_BENCH_QUICK").is_some_and(|value| value == "1")
}

fn record(file: &Path, figure: Figure) -> Result<()> {
    let mut figures: Vec<Figure> = match std::fs::read(file) {
        Ok(bytes) if bytes.is_empty() => Vec::new(),
        Ok(bytes) => {
            serde_json::from_slice(&bytes).with_context(|| format!("read results in {}", file.display()))?
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(|| format!("read {}", file.display())),
    };
    figures.retain(|other| other.name != figure.name);
    figures.push(figure);
    let text = serde_json::to_string_pretty(&figures).context("write results as JSON")?;
    std::fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(name: &str, value: f64) -> Figure {
        Figure { name: name.into(), value, unit: "MB/s".into(), limit: 2.0, ratio: value / 2.0 }
    }

    #[test]
    fn results_are_merged_by_name() {
        let dir = std::env::temp_dir().join(format!("seawall-bench-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        let file = dir.join("results.json");
        for (name, value) in [("a", 1.0), ("b", 1.0), ("a", 2.0)] {
            record(&file, figure(name, value)).unwrap();
        }
        let figures: Vec<Figure> = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        let read: Vec<_> = figures.iter().map(|figure| (figure.name.as_str(), figure.ratio)).collect();
        assert_eq!(read, [("b", 0.5), ("a", 1.0)]);
    }
}
