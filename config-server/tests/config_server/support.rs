use std::path::PathBuf;

use control::fleet::{
    Login, MadeEnrolToken, MadeToken, NewApiToken, NewEnrolToken, NewUser, PartRole, Problem, Role, Scope,
    UserInfo,
};
use enrol::{Client, EnrolError, ServerUrl};
use seawall_config_server::{Config, ConfigServer, Handle, InitOptions, init};
use wire::WebTrust;

pub(crate) const ADMINISTRATOR: &str = "admin";
pub(crate) const PASSWORD: &str = "correct horse battery";

/// A config server, and whoever talks to it.
pub(crate) struct Site {
    pub(crate) base: tempfile::TempDir,
    pub(crate) config: Config,
    pub(crate) server: Option<Handle>,
    pub(crate) url: ServerUrl,
}

pub(crate) async fn site() -> Site {
    site_on(None).await
}

/// With its state in another database than a file.
pub(crate) async fn site_on(database: Option<String>) -> Site {
    let base = tempfile::tempdir().unwrap();
    let dir = base.path().join("config");
    let options = InitOptions {
        dir: dir.clone(),
        listen: "127.0.0.1:0".into(),
        names: vec!["localhost".into(), "127.0.0.1".into()],
        administrator: ADMINISTRATOR.into(),
        password: PASSWORD.into(),
        database,
    };
    init(&options).await.unwrap();
    let mut config = Config::load(&dir.join("config-server.toml")).unwrap();
    let server = ConfigServer::start(config.clone()).await.unwrap();
    // The same place after a restart.
    config.listen = server.local_addr().to_string();
    let url = format!("https://{}", server.local_addr()).parse().unwrap();
    Site { base, config, server: Some(server), url }
}

impl Site {
    pub(crate) fn trust(&self) -> WebTrust {
        WebTrust::Authority(std::fs::read_to_string(self.config.authority.join("ca.pem")).unwrap())
    }

    pub(crate) fn stranger(&self) -> Client {
        Client::new(self.url.clone(), &self.trust(), None, None).unwrap()
    }

    pub(crate) fn with_token(&self, token: &str) -> Client {
        Client::new(self.url.clone(), &self.trust(), None, Some(token.to_owned())).unwrap()
    }

    pub(crate) async fn user(&self, name: &str, password: &str) -> Client {
        let client = self.stranger();
        client.login(&login(name, password)).await.unwrap();
        client
    }

    pub(crate) async fn administrator(&self) -> Client {
        self.user(ADMINISTRATOR, PASSWORD).await
    }

    pub(crate) async fn make_user(&self, name: &str, role: Role) -> Client {
        let new = NewUser { name: name.parse().unwrap(), role, password: PASSWORD.into() };
        let _: UserInfo = self.administrator().await.post("/users", &new).await.unwrap();
        self.user(name, PASSWORD).await
    }

    pub(crate) async fn token(&self, client: &Client, scopes: &[Scope]) -> Client {
        let new = NewApiToken { name: "program".parse().unwrap(), scopes: scopes.to_vec(), days: 1 };
        let made: MadeToken = client.post("/tokens", &new).await.unwrap();
        self.with_token(&made.token)
    }

    pub(crate) async fn enrol_token(&self, role: PartRole) -> String {
        let new = NewEnrolToken { role, name: None, minutes: 10 };
        let made: MadeEnrolToken = self.administrator().await.post("/enrol-tokens", &new).await.unwrap();
        made.token
    }

    /// Enrols a part; where its state is.
    pub(crate) async fn enrol(&self, role: PartRole, name: &str) -> PathBuf {
        let state = self.base.path().join(format!("{role}-{name}"));
        let token = self.enrol_token(role).await;
        enrol::join(self.url.clone(), &token, role, name.parse().unwrap(), &state).await.unwrap();
        state
    }

    pub(crate) fn part(&self, state: &std::path::Path) -> Client {
        let credentials = wire::Credentials::load(&state.join(enrol::CURRENT)).unwrap();
        Client::new(self.url.clone(), &self.trust(), Some(&credentials), None).unwrap()
    }

    pub(crate) async fn stop(&mut self) {
        self.server.take().unwrap().shutdown().await;
    }

    pub(crate) async fn start(&mut self) {
        self.server = Some(ConfigServer::start(self.config.clone()).await.unwrap());
    }
}

pub(crate) fn login(name: &str, password: &str) -> Login {
    Login { name: name.parse().unwrap(), password: password.into() }
}

/// The problem that it must be.
pub(crate) fn problem<T: std::fmt::Debug>(result: Result<T, EnrolError>) -> Problem {
    match result {
        Err(EnrolError::Problem(problem)) => {
            assert!(problem.detail.len() > 10 && problem.mend.len() > 10, "{problem:?}");
            assert_eq!(problem.kind, format!("urn:seawall:problem:{}", problem.code));
            *problem
        }
        other => panic!("{other:?}"),
    }
}
