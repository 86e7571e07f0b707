-- The tables of Fleetwright as version 4 created them, before clusters.
CREATE SCHEMA IF NOT EXISTS fleetwright;
CREATE TABLE IF NOT EXISTS fleetwright.device (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    namespace text NOT NULL,
    name text NOT NULL,
    gateway text NOT NULL,
    attributes jsonb NOT NULL DEFAULT '{}',
    enabled boolean NOT NULL,
    declared boolean NOT NULL DEFAULT true,
    UNIQUE (namespace, name));
COMMENT ON COLUMN fleetwright.device.declared IS 'false once the Device object is gone';
CREATE TABLE IF NOT EXISTS fleetwright.dead_letter (
    time timestamptz NOT NULL,
    namespace text NOT NULL,
    pipeline text NOT NULL,
    gateway text NOT NULL,
    topic text NOT NULL,
    payload bytea NOT NULL,
    reason text NOT NULL,
    detail text NOT NULL);
SELECT public.create_hypertable('fleetwright.dead_letter', public.by_range('time', INTERVAL '1 day'), if_not_exists => true);
CREATE SEQUENCE IF NOT EXISTS fleetwright.dead_letter_id;
ALTER TABLE fleetwright.dead_letter ADD COLUMN IF NOT EXISTS id bigint NOT NULL DEFAULT nextval('fleetwright.dead_letter_id');
COMMENT ON COLUMN fleetwright.dead_letter.id IS 'keeps its value when a replay refuses the message again';
ALTER TABLE fleetwright.dead_letter ADD COLUMN IF NOT EXISTS partial boolean NOT NULL DEFAULT true;
COMMENT ON COLUMN fleetwright.dead_letter.partial IS 'whether other readings of the message are rows';
CREATE INDEX IF NOT EXISTS dead_letter_pipeline_id ON fleetwright.dead_letter (namespace, pipeline, id);
CREATE TABLE IF NOT EXISTS fleetwright.dead_letter_count (
    hour timestamptz NOT NULL,
    namespace text NOT NULL,
    pipeline text NOT NULL,
    gateway text NOT NULL,
    reason text NOT NULL,
    kept bigint NOT NULL,
    kept_bytes bigint NOT NULL,
    discarded bigint NOT NULL,
    PRIMARY KEY (namespace, pipeline, hour, gateway, reason));
CREATE TABLE IF NOT EXISTS fleetwright.dead_letter_retention (
    namespace text NOT NULL,
    pipeline text NOT NULL,
    retention interval NOT NULL,
    PRIMARY KEY (namespace, pipeline));
INSERT INTO fleetwright.dead_letter_retention SELECT DISTINCT namespace, pipeline, INTERVAL '30 days' FROM fleetwright.dead_letter
    ON CONFLICT DO NOTHING;
CREATE TABLE IF NOT EXISTS fleetwright.pipeline_replay (
    namespace text NOT NULL,
    pipeline text NOT NULL,
    token text NOT NULL,
    done_id bigint NOT NULL,
    last_id bigint NOT NULL,
    stored bigint NOT NULL,
    refused bigint NOT NULL,
    left_alone bigint NOT NULL,
    remaining bigint NOT NULL,
    finished boolean NOT NULL,
    failure text,
    PRIMARY KEY (namespace, pipeline, token));
CREATE TABLE IF NOT EXISTS fleetwright.session (
    session text PRIMARY KEY,
    generation bigint NOT NULL,
    topic_filters text[] NOT NULL);
CREATE TABLE IF NOT EXISTS fleetwright.acknowledgement (
    session text NOT NULL,
    batch bigint NOT NULL,
    entries bytea NOT NULL,
    PRIMARY KEY (session, batch));
CREATE TABLE IF NOT EXISTS fleetwright.assignment (
    namespace text NOT NULL,
    pipeline text NOT NULL,
    gateway text NOT NULL,
    worker integer NOT NULL,
    PRIMARY KEY (namespace, pipeline, gateway));
CREATE TABLE IF NOT EXISTS fleetwright.pipeline_table (
    table_name text PRIMARY KEY,
    namespace text NOT NULL,
    pipeline text);
COMMENT ON SCHEMA fleetwright IS '4';
