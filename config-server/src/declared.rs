//! The groups as they are declared, at hand: a look at the fleet would otherwise read thousands of rows that seldom change.
//!
//! Consistency: every change of what is declared moves a number in the store, in the same transaction. What is here counts only while
//! the number is the one that was read before it; so every config server sees a change with its next look.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use block::{Generation, GroupId};
use control::fleet::{Name, Policy, ResourceId, UnixMillis};
use parking_lot::Mutex;
use sqlx::{AnyConnection, Row};

use crate::api::guard::parse;
use crate::fault::{Answer, internal};
use crate::store::{Counter, Store, read_count};
use crate::view;

/// A group that is not removed.
#[derive(Debug)]
pub(crate) struct DeclaredGroup {
    pub(crate) id: GroupId,
    pub(crate) machine: ResourceId,
    /// The machine's.
    pub(crate) name: Name,
    pub(crate) generation: Generation,
    /// Whether its points are kept, and nothing is captured.
    pub(crate) kept: bool,
    pub(crate) policy: Arc<DeclaredPolicy>,
    pub(crate) process: ResourceId,
    pub(crate) targets: Vec<ResourceId>,
    /// Name and device, in their order.
    pub(crate) volumes: Vec<(String, String)>,
    pub(crate) created: UnixMillis,
    /// When a failover was committed, and the machine has not been protected since.
    pub(crate) committed: Option<UnixMillis>,
    /// The group that protects what runs in its place.
    pub(crate) reversed_by: Option<GroupId>,
}

#[derive(Debug)]
pub(crate) struct DeclaredPolicy {
    pub(crate) id: ResourceId,
    pub(crate) name: Name,
    pub(crate) policy: Policy,
}

/// All groups, by their ids' texts.
pub(crate) type Declared = BTreeMap<String, DeclaredGroup>;

/// What was read last, and of which number.
#[derive(Debug, Default)]
pub(crate) struct DeclaredCache {
    known: Mutex<Option<(i64, Arc<Declared>)>>,
}

/// As it is declared now. Who asks for one group only gets at least that one: while much is being declared, not everything is read
/// anew for it.
pub(crate) async fn declared(store: &Store, only: Option<&GroupId>) -> Answer<Arc<Declared>> {
    let mut from = store.read.acquire().await?;
    // 1. the number, 2. what is declared. Reversed, a change between the two would be missed until the next one.
    let version = read_count(&mut from, Counter::Declared).await?;
    if let Some((known, declared)) = &*store.declared.known.lock()
        && *known == version
    {
        return Ok(declared.clone());
    }
    let declared = Arc::new(read(&mut from, only).await?);
    if only.is_some() {
        return Ok(declared);
    }
    let mut known = store.declared.known.lock();
    if known.as_ref().is_none_or(|(known, _)| *known < version) {
        *known = Some((version, declared.clone()));
    }
    Ok(declared)
}

async fn read(from: &mut AnyConnection, only: Option<&GroupId>) -> Answer<Declared> {
    // An id is hexadecimal.
    let of = |column: &str| only.map(|id| format!(" AND {column} = '{id}'")).unwrap_or_default();
    let mut policies: HashMap<String, Arc<DeclaredPolicy>> = HashMap::new();
    for row in &sqlx::query("SELECT id, name, policy FROM policies").fetch_all(&mut *from).await? {
        let id: String = row.try_get("id")?;
        let policy = DeclaredPolicy {
            id: parse(id.clone())?,
            name: parse(row.try_get("name")?)?,
            policy: view::policy_of_text(&row.try_get::<String, _>("policy")?)?,
        };
        policies.insert(id, Arc::new(policy));
    }
    let mut targets: HashMap<String, Vec<ResourceId>> = HashMap::new();
    let sql = format!(
        "SELECT group_id, target_id FROM group_targets WHERE 1 = 1{} ORDER BY target_id",
        of("group_id")
    );
    for row in &sqlx::query(&sql).fetch_all(&mut *from).await? {
        targets.entry(row.try_get("group_id")?).or_default().push(parse(row.try_get("target_id")?)?);
    }
    let mut volumes: HashMap<String, Vec<(String, String)>> = HashMap::new();
    let sql =
        format!("SELECT group_id, name, device FROM volumes WHERE 1 = 1{} ORDER BY place", of("group_id"));
    for row in &sqlx::query(&sql).fetch_all(&mut *from).await? {
        let volume = (row.try_get("name")?, row.try_get("device")?);
        volumes.entry(row.try_get("group_id")?).or_default().push(volume);
    }
    let sql = format!(
        "SELECT g.id, g.machine_id, g.generation, g.policy_id, g.process_id, g.state, g.created, g.committed, g.reversed_by, m.name
         FROM protection_groups g JOIN parts m ON m.id = g.machine_id WHERE g.state <> 'removed'{}",
        of("g.id")
    );
    let mut declared = Declared::new();
    for row in &sqlx::query(&sql).fetch_all(&mut *from).await? {
        let (id, policy): (String, String) = (row.try_get("id")?, row.try_get("policy_id")?);
        let group = DeclaredGroup {
            id: parse(id.clone())?,
            machine: parse(row.try_get("machine_id")?)?,
            name: parse(row.try_get("name")?)?,
            generation: Generation(u64::try_from(row.try_get::<i64, _>("generation")?).unwrap_or_default()),
            kept: row.try_get::<String, _>("state")? == "kept",
            policy: policies
                .get(&policy)
                .cloned()
                .ok_or_else(|| internal("find a group's policy", &policy))?,
            process: parse(row.try_get("process_id")?)?,
            targets: targets.remove(&id).unwrap_or_default(),
            volumes: volumes.remove(&id).unwrap_or_default(),
            created: UnixMillis(row.try_get("created")?),
            reversed_by: match row.try_get::<String, _>("reversed_by")? {
                none if none.is_empty() => None,
                id => Some(parse(id)?),
            },
            committed: Some(UnixMillis(row.try_get("committed")?)).filter(|time| time.0 > 0),
        };
        declared.insert(id, group);
    }
    Ok(declared)
}
