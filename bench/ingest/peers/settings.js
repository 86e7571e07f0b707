// Settings of Node-RED: a flow from a file, and the PostgreSQL client in its functions.
module.exports = {
  flowFile: `${__dirname}/flow.json`,
  uiHost: "127.0.0.1",
  httpAdminRoot: false,
  httpNodeRoot: false,
  credentialSecret: false,
  mqttReconnectTime: 500,
  functionGlobalContext: { pg: require(`${process.env.NODE_RED_MODULES}/pg`), environment: process.env },
  logging: { console: { level: "error" } },
};
