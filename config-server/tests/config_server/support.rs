use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use control::fleet::{
    Login, MadeEnrolToken, MadeToken, NewApiToken, NewEnrolToken, NewUser, PartRole, Problem, Role, Scope,
    UserInfo,
};
use enrol::{Client, EnrolError, ServerUrl};
use scratch::postgres::{PG_BIN, Postgres};
use seawall_config_server::{Config, ConfigServer, Handle, InitOptions, init};
use sqlx::Connection as _;
use wire::WebTrust;

pub(crate) const ADMINISTRATOR: &str = "admin";
pub(crate) const PASSWORD: &str = "correct horse battery";

/// A config server, and whoever talks to it.
pub(crate) struct Site {
    pub(crate) config: Config,
    pub(crate) server: Option<Handle>,
    pub(crate) url: ServerUrl,
    /// Where its state is, when not in a file. Stopped after everything else.
    postgres: Option<Postgres>,
    pub(crate) base: tempfile::TempDir,
}

/// Runs tests with the state in a file, and with the state in PostgreSQL.
macro_rules! on_both {
    ($($test:ident),*) => {
        mod sqlite {
            $(#[tokio::test]
            async fn $test() {
                super::$test(crate::support::site().await).await;
            })*
        }

        mod postgresql {
            $(#[tokio::test]
            async fn $test() {
                if let Some(site) = crate::support::site_on_postgres(stringify!($test)).await {
                    super::$test(site).await;
                }
            })*
        }
    };
}
pub(crate) use on_both;

pub(crate) async fn site() -> Site {
    site_on(tempfile::tempdir().unwrap(), None).await
}

/// With a PostgreSQL server of its own; `None`, said aloud, when there is none here.
pub(crate) async fn site_on_postgres(test: &str) -> Option<Site> {
    let here = Path::new(PG_BIN).join("initdb").exists();
    if !scratch::is_root() || !here {
        let why = format!("{test} needs root and {PG_BIN}/initdb (of postgresql-15)");
        eprintln!("NOT RUN: {why}");
        assert!(std::env::var_os("CI").is_none(), "it must run in CI, but: {why}");
        return None;
    }
    let base = tempfile::tempdir().unwrap();
    // The server's user comes through.
    std::fs::set_permissions(base.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let postgres = Postgres::init(&base.path().join("postgres"), &base.path().join("socket")).unwrap();
    postgres.start().unwrap();
    Some(site_on(base, Some(postgres)).await)
}

fn url_of(postgres: &Postgres, database: &str) -> String {
    format!("postgres://postgres@localhost/{database}?host={}", postgres.place.display())
}

async fn site_on(base: tempfile::TempDir, postgres: Option<Postgres>) -> Site {
    let database = postgres.as_ref().map(|postgres| url_of(postgres, "postgres"));
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
    Site { base, config, server: Some(server), url, postgres }
}

impl Site {
    /// Another database, with nothing in it.
    pub(crate) fn empty_database(&self) -> String {
        match &self.postgres {
            None => format!("sqlite:{}", self.base.path().join("other.db").display()),
            Some(postgres) => {
                postgres.sql("CREATE DATABASE other").unwrap();
                url_of(postgres, "other")
            }
        }
    }

    /// Changes the state behind the config server's back: what took hours there took none here.
    pub(crate) async fn sql(&self, sql: &str) {
        let mut connection = sqlx::AnyConnection::connect(&self.config.database).await.unwrap();
        sqlx::query(sql).execute(&mut connection).await.unwrap();
    }

    /// One more config server with the same state and the same authority.
    pub(crate) async fn another_server(&self) -> (Handle, ServerUrl) {
        let config = Config {
            listen: "127.0.0.1:0".into(),
            credentials: self.base.path().join("credentials-2"),
            ..self.config.clone()
        };
        let server = ConfigServer::start(config).await.unwrap();
        let url = format!("https://{}", server.local_addr()).parse().unwrap();
        (server, url)
    }

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
