use control::fleet::Settings;
use sqlx::AnyConnection;

/// The fleet's settings.
pub(crate) async fn read_settings(from: &mut AnyConnection) -> Result<Settings, sqlx::Error> {
    let kept: Option<String> =
        sqlx::query_scalar("SELECT value FROM settings WHERE name = 'fleet'").fetch_optional(from).await?;
    match kept {
        None => Ok(Settings::default()),
        Some(json) => serde_json::from_str(&json).map_err(|error| sqlx::Error::Decode(error.into())),
    }
}

/// Sets them.
pub(crate) async fn write_settings(act: &mut AnyConnection, settings: &Settings) -> Result<(), sqlx::Error> {
    let json = serde_json::to_string(settings).map_err(|error| sqlx::Error::Encode(error.into()))?;
    sqlx::query(
        "INSERT INTO settings (name, value) VALUES ('fleet', $1) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
    )
    .bind(json)
    .execute(act)
    .await?;
    Ok(())
}
