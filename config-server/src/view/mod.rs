//! What is shown: the one place that makes pictures of what the parts reported. The API and every page ask here.

mod figures;
mod group;
mod job;
mod part;
mod point;
mod policy;

pub(crate) use figures::figures;
pub(crate) use group::{group, groups, groups_by_attention, overview, samples, watched};
pub(crate) use job::{job, job_of_row, jobs};
pub(crate) use part::{SILENT_AFTER, machine, machines, server, servers, state_code};
pub(crate) use point::{keep_points, points, points_wanted};
pub(crate) use policy::{policies, policy, policy_of_text};
