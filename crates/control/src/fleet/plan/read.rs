use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_saphyr::Spanned;

use super::{PLAN_TEXT_BYTES_MAX, Plan, PlanError};

/// Nodes of a text, with what aliases stand for. One with more is refused.
const NODES_MAX: usize = 20_000;

/// Where the steps begin in the text.
#[derive(Deserialize)]
struct Places {
    steps: Vec<Spanned<IgnoredAny>>,
}

fn parse<'de, T: Deserialize<'de>>(text: &'de str) -> Result<T, PlanError> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_nodes: NODES_MAX },
        with_snippet: false,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let line = error.location().map(|location| location.line());
        PlanError { line: line.filter(|line| *line > 0), step: None, reason: error.to_string() }
    })
}

impl Plan {
    /// Reads a text of YAML or JSON, and looks whether it makes sense.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place in the text.
    pub fn read(text: &str) -> Result<Plan, PlanError> {
        if text.len() > PLAN_TEXT_BYTES_MAX {
            let reason = format!("it has {} bytes, at most {PLAN_TEXT_BYTES_MAX} go", text.len());
            return Err(PlanError { line: None, step: None, reason });
        }
        let plan: Plan = parse(text)?;
        plan.check().map_err(|(place, reason)| {
            // Read once more, for the place alone.
            let line = place.and_then(|place| {
                let places: Places = parse(text).ok()?;
                Some(places.steps.get(place)?.referenced.line())
            });
            let step = place.and_then(|place| plan.steps.get(place)).map(|step| step.id.clone());
            PlanError { line: line.filter(|line| *line > 0), step, reason }
        })?;
        Ok(plan)
    }
}
