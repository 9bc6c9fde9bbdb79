//! What each part is to do, out of what is declared. Derived, never stored, so that it cannot disagree.

use std::collections::HashMap;

use control::fleet::{
    AdoptedVolume, Desired, DesiredAgent, DesiredProcessServer, DesiredTargetServer, ForwardedGroup,
    KeptGroup, PartRole, Policy, ProtectedVolume, Protection,
};
use sqlx::{AnyConnection, Row};

use crate::api::guard::parse;
use crate::fault::{Answer, internal};

/// The desired state of a part, and its digest.
pub(crate) async fn desired(
    from: &mut AnyConnection,
    part: &str,
    role: PartRole,
) -> Answer<(Desired, String)> {
    let desired = match role {
        PartRole::Agent => Desired::Agent(agent(from, part).await?),
        PartRole::ProcessServer => Desired::ProcessServer(process_server(from, part).await?),
        PartRole::TargetServer => Desired::TargetServer(target_server(from, part).await?),
    };
    let json = serde_json::to_vec(&desired).map_err(|error| internal("write a desired state", error))?;
    let digest = blake3::hash(&json).to_hex()[..32].to_owned();
    Ok((desired, digest))
}

fn policy(text: &str) -> Answer<Policy> {
    serde_json::from_str(text).map_err(|error| internal("read a policy", error))
}

async fn agent(from: &mut AnyConnection, part: &str) -> Answer<DesiredAgent> {
    let row = sqlx::query(
        "SELECT g.id, g.generation, p.policy, s.address FROM protection_groups g
         JOIN policies p ON p.id = g.policy_id JOIN parts s ON s.id = g.process_id
         WHERE g.machine_id = $1 AND g.state = 'protected'",
    )
    .bind(part)
    .fetch_optional(&mut *from)
    .await?;
    let Some(row) = row else { return Ok(DesiredAgent::default()) };
    let group: String = row.try_get("id")?;
    let volumes = sqlx::query("SELECT name, device FROM volumes WHERE group_id = $1 ORDER BY place")
        .bind(&group)
        .fetch_all(&mut *from)
        .await?;
    let volume = |row: &sqlx::any::AnyRow| -> Answer<ProtectedVolume> {
        Ok(ProtectedVolume { name: row.try_get("name")?, device: row.try_get("device")? })
    };
    let protection = Protection {
        group: parse(group)?,
        generation: block::Generation(u64::try_from(row.try_get::<i64, _>("generation")?).unwrap_or(1)),
        process_server: row.try_get("address")?,
        volumes: volumes.iter().map(volume).collect::<Answer<_>>()?,
        policy: policy(&row.try_get::<String, _>("policy")?)?,
    };
    Ok(DesiredAgent { protection: Some(Box::new(protection)) })
}

async fn process_server(from: &mut AnyConnection, part: &str) -> Answer<DesiredProcessServer> {
    let rows = sqlx::query(
        "SELECT g.id, s.address FROM protection_groups g JOIN group_targets t ON t.group_id = g.id
         JOIN parts s ON s.id = t.target_id
         WHERE g.process_id = $1 AND g.state <> 'removed' AND s.address <> '' ORDER BY g.id, s.address",
    )
    .bind(part)
    .fetch_all(from)
    .await?;
    let mut groups: Vec<ForwardedGroup> = Vec::new();
    for row in &rows {
        let (id, address) = (parse(row.try_get("id")?)?, row.try_get("address")?);
        match groups.last_mut().filter(|last| last.id == id) {
            Some(last) => last.targets.push(address),
            None => groups.push(ForwardedGroup { id, targets: vec![address] }),
        }
    }
    Ok(DesiredProcessServer { groups })
}

async fn target_server(from: &mut AnyConnection, part: &str) -> Answer<DesiredTargetServer> {
    let rows = sqlx::query(
        "SELECT g.id, t.sealed_key, p.policy FROM group_targets t JOIN protection_groups g ON g.id = t.group_id
         JOIN policies p ON p.id = g.policy_id WHERE t.target_id = $1 AND g.state <> 'removed' ORDER BY g.id",
    )
    .bind(part)
    .fetch_all(&mut *from)
    .await?;
    let adopting = sqlx::query(
        "SELECT v.group_id, v.name, v.adopt FROM volumes v JOIN group_targets t ON t.group_id = v.group_id
         WHERE t.target_id = $1 AND v.adopt <> '' ORDER BY v.group_id, v.place",
    )
    .bind(part)
    .fetch_all(from)
    .await?;
    let mut adopted: HashMap<String, Vec<AdoptedVolume>> = HashMap::new();
    for row in &adopting {
        let volume = AdoptedVolume { name: row.try_get("name")?, device: row.try_get("adopt")? };
        adopted.entry(row.try_get("group_id")?).or_default().push(volume);
    }
    let mut kept = |row: &sqlx::any::AnyRow| -> Answer<KeptGroup> {
        let policy = policy(&row.try_get::<String, _>("policy")?)?;
        let id: String = row.try_get("id")?;
        Ok(KeptGroup {
            adopt: adopted.remove(&id).unwrap_or_default(),
            id: parse(id)?,
            sealed_key: row.try_get("sealed_key")?,
            retention: policy.retention_text(),
            space_bytes_max: policy.space_bytes_max,
        })
    };
    Ok(DesiredTargetServer { groups: rows.iter().map(&mut kept).collect::<Answer<_>>()? })
}
