-- Recovery points as targets tell them of groups at which somebody looks. `looked`: when somebody last did.
ALTER TABLE protection_groups ADD COLUMN looked BIGINT NOT NULL DEFAULT 0;

CREATE TABLE point_lists (
    group_id TEXT NOT NULL REFERENCES protection_groups (id),
    target_id TEXT NOT NULL REFERENCES parts (id),
    time BIGINT NOT NULL,
    newest BIGINT NOT NULL,
    list TEXT NOT NULL,
    PRIMARY KEY (group_id, target_id)
);
