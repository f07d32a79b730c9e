{{- /*
Values that are valid each, and contradict each other. All problems are reported together; each line names
the values and what to do. The range of a single value is in values.schema.json.
*/ -}}
{{- define "websocket-relay.checks" -}}
{{- $problems := list -}}
{{- range list "names" "replicas" "stop" "secrets" "tls" "tokens" "ways" "resources" "scraping" "budgets" "network" "environment" -}}
{{- range splitList "\n" (include (printf "websocket-relay.checks.%s" .) $) -}}
{{- if trim . -}}
{{- $problems = append $problems (printf "- %s" (trim .)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $problems -}}
{{- printf "\nThese values do not fit together:\n%s\n" (join "\n" $problems) | fail -}}
{{- end -}}
{{- end -}}

{{- define "websocket-relay.checks.names" -}}
{{- $fullname := include "websocket-relay.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $fullname) }}
the release's name and nameOverride result in objects named {{ $fullname }}, and a Service's name begins with a letter and contains only a-z, 0-9 and -; set fullnameOverride to such a name
{{- end }}
{{- range $labels := list "podLabels" "commonLabels" }}
{{- range $label, $_ := include "websocket-relay.selectorLabels" $ | fromYaml }}
{{- if hasKey (default dict (get $.Values $labels)) $label }}
{{ $labels }} has {{ $label }}, by which the Service and other objects select the pods; leave it out, or set nameOverride
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "websocket-relay.checks.replicas" -}}
{{- $alone := eq (include "websocket-relay.backplane" .) "memory" -}}
{{- $scaler := and .Values.autoscaling.enabled .Values.autoscaling.create }}
{{- with .Values.autoscaling }}
{{- if and .enabled $alone (gt (int .maxReplicas) 1) }}
autoscaling.maxReplicas is {{ int .maxReplicas }} and config.backplane.url is memory://, so the replicas would not exchange messages; set config.backplane.url to a Redis or NATS, or secrets.backplaneUrl.name to a Secret with its address
{{- end }}
{{- if and $scaler (gt (int .minReplicas) (int .maxReplicas)) }}
autoscaling.minReplicas is {{ int .minReplicas }} and autoscaling.maxReplicas {{ int .maxReplicas }}; set the first to less or the second to more
{{- end }}
{{- if and $scaler (not .targetCPUUtilizationPercentage) (not .targetConnectedClients) (not .metrics) }}
autoscaling.enabled is true and none of autoscaling.targetCPUUtilizationPercentage, autoscaling.targetConnectedClients and autoscaling.metrics is set; set one of them
{{- end }}
{{- if and $scaler .targetCPUUtilizationPercentage (not (dig "requests" "cpu" "" (default dict $.Values.resources))) }}
autoscaling.targetCPUUtilizationPercentage is a percentage of resources.requests.cpu, which is not set; set it, or the first to 0
{{- end }}
{{- if and $scaler .targetConnectedClients (not $.Values.config.metrics.enabled) }}
autoscaling.targetConnectedClients is read from the metrics and config.metrics.enabled is false; set that to true, or the first to 0
{{- end }}
{{- end }}
{{- if and (not .Values.autoscaling.enabled) $alone (gt (int .Values.replicaCount) 1) }}
replicaCount is {{ int .Values.replicaCount }} and config.backplane.url is memory://, so the replicas would not exchange messages; set config.backplane.url to a Redis or NATS, or secrets.backplaneUrl.name to a Secret with its address
{{- end }}
{{- end -}}

{{- define "websocket-relay.checks.stop" -}}
{{- $shutdown := .Values.config.shutdown -}}
{{- $grace := include "websocket-relay.gracePeriod" . | float64 -}}
{{- /* A fifth of the time is for the closing handshakes, half a second for the exit (docs/explanation/scaling.md). */ -}}
{{- $needed := addf $shutdown.readiness_delay_s (mulf 1.25 $shutdown.spread_s) 0.5 -}}
{{- if le $grace (float64 $shutdown.timeout_s) }}
terminationGracePeriodSeconds is {{ $grace }} and config.shutdown.timeout_s {{ $shutdown.timeout_s }}, so the relay would be killed while it drains; leave terminationGracePeriodSeconds empty, or set it to more
{{- end }}
{{- if gt $needed (float64 $shutdown.timeout_s) }}
config.shutdown.timeout_s is {{ $shutdown.timeout_s }}, which is too short for config.shutdown.readiness_delay_s ({{ $shutdown.readiness_delay_s }}) and config.shutdown.spread_s ({{ $shutdown.spread_s }}), so clients would be aborted; set it to {{ ceil $needed }} or more
{{- end }}
{{- end -}}

{{- define "websocket-relay.checks.secrets" -}}
{{- $url := .Values.config.backplane.url -}}
{{- /* Neither address is printed: it may contain a password. The relay checks its address in the same way. */ -}}
{{- $server := `([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?` -}}
{{- $servers := printf "%s(,%s)*" $server $server -}}
{{- $redis := `[?&](client_name|db|(sentinel_)?username)=[^&]*` -}}
{{- $rediss := `[?&](client_name|db|(sentinel_)?username|ssl_(ca_certs|ca_path|cert_reqs|certfile|keyfile|check_hostname))=[^&]*` -}}
{{- $nats := `[?&](replicas=[135]|ssl_(ca_certs|certfile|keyfile)=[^&]*)` -}}
{{- $tls := `[?&](replicas=[135]|handshake_first=(true|false)|ssl_(ca_certs|certfile|keyfile)=[^&]*)` -}}
{{- $forms := list
  `memory://`
  `unix:///[^?]+`
  (printf `(redis|valkey)://%s(/[0-9]{0,9})?(%s)*` $server $redis)
  (printf `(rediss|valkeys)://%s(/[0-9]{0,9})?(%s)*` $server $rediss)
  (printf `(redis|valkey)[+]cluster://%s(/0?)?(%s)*` $servers $redis)
  (printf `(rediss|valkeys)[+]cluster://%s(/0?)?(%s)*` $servers $rediss)
  (printf `(redis|valkey)[+]sentinel://%s/[^/?]+(/[0-9]{0,9})?(%s)*` $servers $redis)
  (printf `(rediss|valkeys)[+]sentinel://%s/[^/?]+(/[0-9]{0,9})?(%s)*` $servers $rediss)
  (printf `nats://%s/?(%s)*` $servers $nats)
  (printf `tls://%s/?(%s)*` $servers $tls)
-}}
{{- $port := 0 -}}
{{- range include "websocket-relay.brokerPorts" . | fromJsonArray -}}
{{- $port = max $port (int .) -}}
{{- end -}}
{{- $isSecret := or (contains "@" $url) (regexMatch "[?&][^=&]*pass[^=&]*=" $url) -}}
{{- if and (not $isSecret) (or (gt (int $port) 65535) (not (regexMatch (printf "^(%s)$" (join "|" $forms)) $url))) }}
config.backplane.url is not the address of a broker that the relay supports; set it to one like redis://redis:6379/0, rediss+sentinel://one:26379,two:26379/mymaster/0, redis+cluster://one:6379,two:6379 or nats://one:4222,two:4222?replicas=3
{{- end }}
{{- $keys := .Values.config.auth.jwt.jwks_url -}}
{{- if and $keys (not (regexMatch "^https?://[^/?#@[:space:]]+([/?#][^[:space:]]*)?$" $keys)) }}
config.auth.jwt.jwks_url is not a valid address; set it to one like https://issuer.example.com/jwks.json, without a user or a password
{{- end }}
{{- if $isSecret }}
config.backplane.url contains a user or a password, which would be readable in the pod; put the address into a Secret, set secrets.backplaneUrl.name to it and leave config.backplane.url at its default
{{- end }}
{{- if and .Values.secrets.backplaneUrl.name (ne $url "memory://") }}
config.backplane.url and secrets.backplaneUrl.name both set the broker's address; leave one of them out
{{- end }}
{{- range $value := list "backplanePassword" "backplaneCreds" "backplaneNkey" }}
{{- if get $.Values.secrets $value | dig "name" "" }}
{{- if eq (include "websocket-relay.backplane" $) "memory" }}
secrets.{{ $value }}.name is set and config.backplane.url is memory://, so there is no broker; set the address of one, or leave secrets.{{ $value }}.name empty
{{- else if and (ne $value "backplanePassword") (not (regexMatch "^(nats|tls)?$" (include "websocket-relay.backplane" $))) }}
secrets.{{ $value }}.name is set, which only NATS has, and config.backplane.url is another broker; leave secrets.{{ $value }}.name empty, or set secrets.backplanePassword.name
{{- end }}
{{- end }}
{{- end }}
{{- range $value := list "caSecretName" "clientSecretName" }}
{{- if and (get $.Values.tls $value) (eq (include "websocket-relay.backplane" $) "memory") }}
tls.{{ $value }} is {{ get $.Values.tls $value }} and config.backplane.url is memory://, so there is no broker; set the address of one, or leave tls.{{ $value }} empty
{{- end }}
{{- end }}
{{- if dig "password" "" .Values.config.backplane }}
config.backplane.password is set, and would be readable in the pod; put it into a Secret, set secrets.backplanePassword.name to that and leave config.backplane.password empty
{{- end }}
{{- range $name := list "secret" "secrets" }}
{{- if get $.Values.config.auth.jwt $name }}
config.auth.jwt.{{ $name }} is set, and would be readable in the pod; put it into a Secret, set secrets.jwtSecret.name to that and leave this empty
{{- end }}
{{- end }}
{{- end -}}

{{- define "websocket-relay.checks.tls" -}}
{{- with .Values }}
{{- $served := .config.server.tls }}
{{- if and $served.enabled (not .tls.secretName) (not (hasPrefix "/" $served.cert_file)) }}
config.server.tls.enabled is true and tls.secretName is empty; set it to a Secret of type kubernetes.io/tls, or config.server.tls.cert_file and key_file to absolute paths in extraVolumeMounts
{{- end }}
{{- if and .tls.secretName (not $served.enabled) }}
tls.secretName is {{ .tls.secretName }} and config.server.tls.enabled is false, so it would not be used; set config.server.tls.enabled to true, or leave tls.secretName empty
{{- end }}
{{- end }}
{{- end -}}

{{- define "websocket-relay.checks.tokens" -}}
{{- $auth := .Values.config.auth -}}
{{- $secret := .Values.secrets.jwtSecret.name -}}
{{- $key := .Values.secrets.jwtPublicKey.name -}}
{{- $byKey := or $key $auth.jwt.public_key_file $auth.jwt.jwks_url -}}
{{- $signed := dict "secret" list "key" list -}}
{{- range $auth.jwt.algorithms -}}
{{- $kind := ternary "secret" "key" (hasPrefix "HS" .) -}}
{{- $_ := set $signed $kind (append (get $signed $kind) .) -}}
{{- end -}}
{{- if not $auth.jwt.algorithms }}
config.auth.jwt.algorithms is empty; set it to the algorithms of the tokens, like [RS256]
{{- end }}
{{- if eq $auth.mode "none" }}
{{- if or $secret $byKey }}
{{ ternary "secrets.jwtSecret.name" (ternary "secrets.jwtPublicKey.name" "config.auth.jwt" (not (not $key))) (not (not $secret)) }} is set and config.auth.mode is none, so no token is required; set config.auth.mode to jwt, or leave the first out
{{- end }}
{{- else }}
{{- if and $signed.secret (not $secret) (not $auth.jwt.secret) }}
config.auth.jwt.algorithms has {{ join ", " $signed.secret }} and secrets.jwtSecret.name is empty; set it to the Secret with the shared secret of the tokens, or config.auth.jwt.algorithms to algorithms with public keys
{{- end }}
{{- if and $signed.key (not $byKey) }}
config.auth.jwt.algorithms has {{ join ", " $signed.key }} and there is no public key; set secrets.jwtPublicKey.name to a Secret with one, or config.auth.jwt.jwks_url
{{- end }}
{{- if and $byKey (not $signed.key) }}
{{ ternary "secrets.jwtPublicKey.name" "config.auth.jwt.jwks_url" (not (not $key)) }} is set and config.auth.jwt.algorithms has {{ join ", " $signed.secret }} only, which use no public key; set config.auth.jwt.algorithms to the algorithms of the tokens, like RS256
{{- end }}
{{- if and $key (or $auth.jwt.jwks_url $auth.jwt.public_key_file) }}
secrets.jwtPublicKey.name and config.auth.jwt.{{ ternary "jwks_url" "public_key_file" (not (not $auth.jwt.jwks_url)) }} both set the public keys; leave one of them out
{{- end }}
{{- end }}
{{- end -}}

{{- define "websocket-relay.checks.ways" -}}
{{- with .Values }}
{{- if and .ingress.enabled (not .ingress.hosts) }}
ingress.enabled is true and ingress.hosts is empty; set it to the host names of the relay, like [relay.example.com]
{{- end }}
{{- if and .httpRoute.enabled (not .httpRoute.hostnames) }}
httpRoute.enabled is true and httpRoute.hostnames is empty; set it to the host names of the relay, like [relay.example.com]
{{- end }}
{{- if and .httpRoute.enabled (not .httpRoute.parentRefs) }}
httpRoute.enabled is true and httpRoute.parentRefs is empty; set it to the Gateway of the route, like [{name: public}]
{{- end }}
{{- if and (eq .service.ipFamilyPolicy "RequireDualStack") (regexMatch `^[0-9.]+$` (toString .config.server.host)) }}
service.ipFamilyPolicy is RequireDualStack and config.server.host is {{ .config.server.host }}, an IPv4 address; set config.server.host to ::, or service.ipFamilyPolicy to SingleStack
{{- end }}
{{- if and .service.externalTrafficPolicy (eq .service.type "ClusterIP") }}
service.externalTrafficPolicy is {{ .service.externalTrafficPolicy }} and service.type is ClusterIP, which is not reachable from outside; leave the first empty, or set service.type to NodePort or LoadBalancer
{{- end }}
{{- if and .service.loadBalancerSourceRanges (ne .service.type "LoadBalancer") }}
service.loadBalancerSourceRanges is set and service.type is {{ .service.type }}, so it would have no effect; leave the first empty, or set service.type to LoadBalancer
{{- end }}
{{- if and .serviceMonitor.enabled (not .config.metrics.enabled) }}
serviceMonitor.enabled is true and config.metrics.enabled is false, so there is no port to scrape; set both or neither
{{- end }}
{{- if and .prometheusRule.enabled (not .config.metrics.enabled) }}
prometheusRule.enabled is true and config.metrics.enabled is false, so there are no metrics; set both or neither
{{- end }}
{{- range $section := list "server" "metrics" }}
{{- $host := get $.Values.config $section | dig "host" "" | toString }}
{{- if or (hasPrefix "127." $host) (has $host (list "localhost" "::1")) }}
config.{{ $section }}.host is {{ $host }}, which neither probes nor service.port reach; set config.{{ $section }}.host to 0.0.0.0, or to :: for IPv6
{{- end }}
{{- end }}
{{- if eq (int .config.server.port) 0 }}
config.server.port is 0, any free port, which service.port can't target; set config.server.port to a port
{{- end }}
{{- if and .config.metrics.enabled (eq (int .config.metrics.port) 0) }}
config.metrics.port is 0, any free port, which service.metricsPort and probes can't target; set config.metrics.port to a port
{{- end }}
{{- if and .config.metrics.enabled (eq (int .config.metrics.port) (int .config.server.port)) }}
config.metrics.port and config.server.port are both {{ int .config.server.port }}; set one of them to another port
{{- end }}
{{- if and .config.metrics.enabled (eq .service.type "ClusterIP") (eq (int .service.port) (int .service.metricsPort)) }}
service.port and service.metricsPort are both {{ int .service.port }}; set one of them to another port
{{- end }}
{{- end }}
{{- end -}}

{{- define "websocket-relay.checks.resources" -}}
{{- $backlog := .Values.config.limits.total_backlog_bytes -}}
{{- with include "websocket-relay.memoryLimit" . }}
{{- if le (float64 .) (float64 $backlog) }}
resources.limits.memory is {{ $.Values.resources.limits.memory }} and config.limits.total_backlog_bytes {{ int64 $backlog }}, so slow clients could use all of the memory and the relay would be killed; set the first to three times the second and more, or the second to less
{{- end }}
{{- end }}
{{- end -}}

{{- /* A duration of Prometheus in seconds. */ -}}
{{- define "websocket-relay.seconds" -}}
{{- $units := dict "ms" 0.001 "s" 1 "m" 60 "h" 3600 "d" 86400 "w" 604800 "y" 31536000 -}}
{{- $total := 0.0 -}}
{{- range regexFindAll "[0-9]+[a-z]+" . -1 -}}
{{- $total = addf $total (mulf (regexFind "[0-9]+" .) (get $units (regexFind "[a-z]+" .))) -}}
{{- end -}}
{{- $total -}}
{{- end -}}

{{- define "websocket-relay.checks.scraping" -}}
{{- with .Values.serviceMonitor }}
{{- if and .enabled (gt (include "websocket-relay.seconds" .scrapeTimeout | float64) (include "websocket-relay.seconds" .interval | float64)) }}
serviceMonitor.scrapeTimeout is {{ .scrapeTimeout }} and serviceMonitor.interval {{ .interval }}, which Prometheus refuses; set the first to less or the second to more
{{- end }}
{{- end }}
{{- end -}}

{{- /* How many of the replicas a number or a percentage is, rounded up as by Kubernetes. */ -}}
{{- define "websocket-relay.partOfReplicas" -}}
{{- $text := toString .value -}}
{{- $number := trimSuffix "%" $text | float64 -}}
{{- ternary (divf (mulf $number .replicas) 100 | ceil) $number (hasSuffix "%" $text) -}}
{{- end -}}

{{- define "websocket-relay.checks.budgets" -}}
{{- $replicas := ternary .Values.autoscaling.minReplicas .Values.replicaCount .Values.autoscaling.enabled | int }}
{{- with .Values.podDisruptionBudget }}
{{- /* Not only null: Helm 4 ignores a null in the values of a parent chart. */}}
{{- $most := not (has (toString .maxUnavailable) (list "" "<nil>")) }}
{{- $least := not (has (toString .minAvailable) (list "" "<nil>")) }}
{{- if and .enabled $most $least }}
podDisruptionBudget.maxUnavailable and podDisruptionBudget.minAvailable are both set; set one of them to ""
{{- end }}
{{- if and .enabled (not $most) (not $least) }}
podDisruptionBudget.enabled is true and neither podDisruptionBudget.maxUnavailable nor podDisruptionBudget.minAvailable is set; set one of them
{{- end }}
{{- if and .enabled $most (eq (include "websocket-relay.partOfReplicas" (dict "value" .maxUnavailable "replicas" 100) | float64) 0.0) }}
podDisruptionBudget.maxUnavailable is {{ .maxUnavailable }}, so no node with a relay could be drained; set it to 1 or more
{{- end }}
{{- if and .enabled $least (not $most) $replicas (ge (include "websocket-relay.partOfReplicas" (dict "value" .minAvailable "replicas" $replicas) | float64) (float64 $replicas)) }}
podDisruptionBudget.minAvailable is {{ .minAvailable }} and the number of replicas {{ $replicas }}, so no node with a relay could be drained; set podDisruptionBudget.minAvailable to "" and podDisruptionBudget.maxUnavailable to 1, or add replicas
{{- end }}
{{- end }}
{{- end -}}

{{- define "websocket-relay.checks.network" -}}
{{- with .Values }}
{{- if and .networkPolicy.enabled .secrets.backplaneUrl.name (not .networkPolicy.broker.ports) }}
networkPolicy.enabled is true and the broker's port is in the Secret secrets.backplaneUrl.name; set networkPolicy.broker.ports, like [6379]
{{- end }}
{{- end }}
{{- end -}}

{{- define "websocket-relay.checks.environment" -}}
{{- $values := dict -}}
{{- range $value, $variable := include "websocket-relay.secretVariables" . | fromYaml -}}
{{- $_ := set $values (trimSuffix "_FILE" $variable) (printf "secrets.%s" $value) -}}
{{- end -}}
{{- range .Values.extraEnv }}
{{- $variable := upper .name }}
{{- if hasPrefix "RELAY__" $variable }}
{{- $setting := trimPrefix "relay__" (lower .name) | replace "__" "." | printf "config.%s" }}
extraEnv has {{ .name }}, which would override config without being checked; set {{ default $setting (get $values (trimSuffix "_FILE" $variable)) }} instead
{{- end }}
{{- end }}
{{- end -}}
