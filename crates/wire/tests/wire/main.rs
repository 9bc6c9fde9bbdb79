//! Two real sides over loopback.

mod delivery;
mod measure;
mod operate;
mod peers;
mod throughput;

use std::path::PathBuf;
use std::sync::Arc;

use block::GroupId;
use wire::{Authority, Connection, Credentials, Identity, Listener, Opening, Role, WireError};

const GROUP: GroupId = GroupId([7; 16]);

/// An authority with everybody who takes part.
struct Site {
    dir: tempfile::TempDir,
    authority: Authority,
}

impl Site {
    fn new() -> Site {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(&dir.path().join("ca")).unwrap();
        Site { dir, authority }
    }

    fn issue(&self, role: Role, name: &str, group: Option<GroupId>) -> Arc<Credentials> {
        Arc::new(Credentials::load(&self.issue_files(role, name, group)).unwrap())
    }

    fn issue_files(&self, role: Role, name: &str, group: Option<GroupId>) -> PathBuf {
        let dir = self.dir.path().join(name);
        self.authority.issue(&Identity::new(role, name, group).unwrap(), &dir).unwrap();
        dir
    }

    fn agent(&self) -> Arc<Credentials> {
        self.issue(Role::Agent, "agent", Some(GROUP))
    }

    fn operator(&self) -> Arc<Credentials> {
        self.issue(Role::Operator, "operator", None)
    }

    /// A target server that waits for one peer, and its address.
    async fn server(&self) -> (Listener, String) {
        let listener =
            Listener::bind("127.0.0.1:0", self.issue(Role::TargetServer, "target", None)).await.unwrap();
        let addr = listener.local_addr().to_string();
        (listener, addr)
    }
}

async fn accept(listener: &Listener) -> Result<Connection, WireError> {
    listener.accept().await.unwrap().handshake().await
}

async fn open(listener: &Listener) -> Result<Opening, WireError> {
    Opening::read(accept(listener).await?).await
}
