//! Asks the servers.

use std::path::Path;

use anyhow::{Context, bail};
use block::GroupId;
use control::{
    ExportInfo, ExportPlace, ExportRequest, ExportsReply, OperatorRequest, PointsReply, ServerStatus,
};
use serde::de::DeserializeOwned;
use wire::{Credentials, Operator, RefusalCode, Role, ViewReader, WireError};

use crate::bridge::Bridge;
use crate::config::OperatorConfig;
use crate::config::Place;
use crate::exit::{Exit, stop};

/// Both servers, and what proves the operator to them.
#[derive(Debug)]
pub(crate) struct Servers {
    config: OperatorConfig,
    credentials: Credentials,
}

impl Servers {
    pub(crate) fn load(place: &Place) -> anyhow::Result<Servers> {
        let config = OperatorConfig::load(place)?;
        let credentials = Credentials::load(&config.operator.credentials)?;
        Ok(Servers { config, credentials })
    }

    fn address(&self, role: Role) -> &str {
        match role {
            Role::ProcessServer => &self.config.operator.process_server,
            _ => &self.config.operator.target_server,
        }
    }

    /// Asks a server how it is.
    pub(crate) async fn status(&self, role: Role) -> anyhow::Result<ServerStatus> {
        self.call(role, &OperatorRequest::Status).await
    }

    /// Asks the target server for its points.
    pub(crate) async fn points(&self, group: Option<block::GroupId>) -> anyhow::Result<PointsReply> {
        self.call(Role::TargetServer, &OperatorRequest::Points { group }).await
    }

    /// Asks the target server for a view.
    pub(crate) async fn view(&self, request: &OperatorRequest) -> anyhow::Result<ViewReader> {
        let json = serde_json::to_string(request)?;
        let addr = self.address(Role::TargetServer);
        Operator::stream(addr, Role::TargetServer, &self.credentials, &json)
            .await
            .map_err(|error| advise(Role::TargetServer, addr, error))
    }

    /// Asks the target server to export. Unless detached, the export lasts as long as what this gives.
    pub(crate) async fn export(&self, request: ExportRequest) -> anyhow::Result<Held> {
        let detached = request.detach;
        let request = OperatorRequest::Export(request);
        if detached {
            let info = self.call(Role::TargetServer, &request).await?;
            return Ok(Held { info, connection: None });
        }
        let reader = self.view(&request).await?;
        let info = serde_json::from_str(reader.head()).context("read what is exported")?;
        Ok(Held { info, connection: Some(reader) })
    }

    /// A way to an export that listens with TLS.
    pub(crate) fn bridge(&self, info: &ExportInfo, socket: Option<&Path>) -> anyhow::Result<Bridge> {
        let ExportPlace::Tls(address) = info.place else { bail!("lead to an export that has no TLS") };
        // The target server may not know by which name or address it is reached.
        let host = match self.address(Role::TargetServer).rsplit_once(':') {
            Some((host, _)) if address.ip().is_unspecified() => format!("{host}:{}", address.port()),
            _ => address.to_string(),
        };
        Bridge::start(host, &self.credentials, socket)
    }

    pub(crate) async fn exports(&self) -> anyhow::Result<ExportsReply> {
        self.call(Role::TargetServer, &OperatorRequest::Exports).await
    }

    pub(crate) async fn stop_export(&self, id: u64) -> anyhow::Result<ExportsReply> {
        self.call(Role::TargetServer, &OperatorRequest::StopExport { id }).await
    }

    /// Asks the target server to change something.
    pub(crate) async fn change<A: DeserializeOwned>(&self, request: &OperatorRequest) -> anyhow::Result<A> {
        self.call(Role::TargetServer, request).await
    }

    /// The group that is meant: the one named, or the only one there is.
    pub(crate) async fn one_group(&self, named: Option<GroupId>) -> anyhow::Result<control::TargetGroup> {
        let ServerStatus::TargetServer(status) = self.status(Role::TargetServer).await? else {
            anyhow::bail!("ask the target server how it is: a process server answered; look at operator.toml")
        };
        let mut groups =
            status.groups.into_iter().filter(|group| named.is_none_or(|named| named == group.group));
        match (groups.next(), groups.next(), named) {
            (Some(group), None, _) => Ok(group),
            (None, _, Some(named)) => {
                Err(stop(Exit::NotFound, format!("find group {named}: the target server does not keep it")))
            }
            (None, _, None) => Err(stop(Exit::NotFound, "find the group: the target server keeps none")),
            (Some(first), Some(second), _) => anyhow::bail!(
                "find the group: the target server keeps {}, {} and maybe more; say which with --group ID",
                first.group,
                second.group
            ),
        }
    }

    async fn call<A: DeserializeOwned>(&self, role: Role, request: &OperatorRequest) -> anyhow::Result<A> {
        let json = serde_json::to_string(request)?;
        let addr = self.address(role);
        let answer = Operator::call(addr, role, &self.credentials, &json)
            .await
            .map_err(|error| advise(role, addr, error))?;
        serde_json::from_str(&answer)
            .with_context(|| format!("read the answer of the {role} at {addr}; is it of the same version?"))
    }
}

/// An export that ends when this is dropped, unless it is detached.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) info: ExportInfo,
    connection: Option<ViewReader>,
}

impl Held {
    /// Waits until the target server ends it; says why.
    pub(crate) async fn ended(&mut self) -> anyhow::Error {
        match &mut self.connection {
            Some(connection) => match connection.next().await {
                Ok(_) => anyhow::anyhow!("the target server ended the export"),
                Err(error) => anyhow::Error::new(error).context("the export has ended"),
            },
            None => std::future::pending().await,
        }
    }
}

/// The error with what was tried, and what to do.
fn advise(role: Role, addr: &str, error: WireError) -> anyhow::Error {
    let advice = match &error {
        WireError::Connect { source, .. } => {
            return stop(
                Exit::Unreachable,
                format!(
                    "connect to the {role} at {addr}: {source}. Look whether it runs (`seawall run --role {role}`) and \
                     whether the network lets the port through."
                ),
            );
        }
        WireError::Tls { .. } | WireError::Identity { .. } => {
            format!("Compare ca.pem of the operator and of the {role}, and both machines' clocks.")
        }
        WireError::Handshake { .. } => "Use the same version of Seawall on both sides.".to_owned(),
        WireError::Refused { code: RefusalCode::Unauthorised, .. } => {
            "Use the operator's credentials, those under DIR/operator.".to_owned()
        }
        WireError::Refused { retry: true, .. } | WireError::Lost { .. } | WireError::Closed { .. } => {
            format!("Try again; if it stays, look at the log of the {role}.")
        }
        WireError::TimedOut { .. } => format!("Look whether {addr} is a {role}, and at its log."),
        _ => return anyhow::Error::new(error).context(format!("ask the {role} at {addr}")),
    };
    anyhow::anyhow!("ask the {role} at {addr}: {error}. {advice}")
}
